"""Exact search with sparse matrices: the best documents of each query by inner product."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp

# The largest product held at once has QUERY_CHUNK * DOC_CHUNK entries of 8 bytes: 67 MB.
QUERY_CHUNK = 256
DOC_CHUNK = 32_768


def search(queries: sp.csr_matrix, docs: sp.csr_matrix, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The ``k`` documents with the largest inner product for each query.

    Term by term over an inverted index of a chunk of documents, so that neither a dense vector nor the scores of
    all documents for all queries exist. Equivalent: ``(queries @ docs.T).toarray().argsort()``, largest first.

    Args:
        queries: (Q, V) sparse, weights >= 0.
        docs: (n, V) sparse, weights >= 0.
        k: how many; may exceed n.

    Returns:
        scores: (Q, k) float32, largest first, 0 where there are fewer documents.
        indices: (Q, k) int64, rows of ``docs``; ties go to the lower index; -1 where fewer than ``k`` documents
            score above 0.

    Raises:
        ValueError: if the vocabularies differ or ``k`` is below 1.
    """
    if queries.shape[1] != docs.shape[1]:
        raise ValueError(
            f"docs: expected vectors over the queries' vocabulary of {queries.shape[1]} words, got {docs.shape[1]};"
            " encode both with the same model"
        )
    if k < 1:
        raise ValueError(f"k: expected a number >= 1, got {k}; ask for at least one document")
    queries, docs = (sp.csr_matrix(matrix, dtype=np.float32) for matrix in (queries, docs))
    scores = np.zeros((queries.shape[0], k), dtype=np.float32)
    indices = np.full((queries.shape[0], k), -1, dtype=np.int64)
    for first_doc in range(0, docs.shape[0], DOC_CHUNK):
        inverted = docs[first_doc : first_doc + DOC_CHUNK].T.tocsr()
        for first_query in range(0, queries.shape[0], QUERY_CHUNK):
            product = queries[first_query : first_query + QUERY_CHUNK] @ inverted
            for row in range(product.shape[0]):
                entries = slice(product.indptr[row], product.indptr[row + 1])
                new = best_k(product.data[entries], product.indices[entries], k)
                _merge(scores[first_query + row], indices[first_query + row], new, first_doc)
    return scores, indices


def best_k(scores: np.ndarray, indices: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """At most ``k`` entries with a score above 0, largest first; ties go to the lower index.

    Args:
        scores: (m,).
        indices: (m,) integers, in any order.
        k: how many.
    """
    if len(scores) > k:
        # Every entry that ties with the k-th best stays: the index decides among them.
        kept = scores >= np.partition(scores, len(scores) - k)[len(scores) - k]
        scores, indices = scores[kept], indices[kept]
    positive = scores > 0
    scores, indices = scores[positive], indices[positive]
    order = np.lexsort((indices, -scores))[:k]
    return scores[order], indices[order]


def _merge(scores: np.ndarray, indices: np.ndarray, new: tuple[np.ndarray, np.ndarray], offset: int) -> None:
    """Merges a chunk's best, whose indices start at ``offset``, into one query's row, in place."""
    new_scores, new_indices = new
    found = int(np.count_nonzero(indices >= 0))
    merged = best_k(
        np.concatenate([scores[:found], new_scores]),
        np.concatenate([indices[:found], new_indices.astype(np.int64) + offset]),
        len(scores),
    )
    size = len(merged[0])
    scores[:size], indices[:size] = merged


def ranked_run(
    scores: np.ndarray, indices: np.ndarray, query_ids: Sequence[str], doc_ids: Sequence[str]
) -> dict[str, dict[str, float]]:
    """The result of a search by ids, best first: query id -> document id -> score.

    Args:
        scores: (Q, k) of :func:`search`.
        indices: (Q, k) of :func:`search`; -1 is left out.
        query_ids: Q of them.
        doc_ids: ids of the rows of the searched matrix.

    Raises:
        ValueError: if the number of query ids is another than that of the rows.
    """
    if len(query_ids) != len(indices):
        raise ValueError(
            f"query_ids: expected one for each of {len(indices)} rows, got {len(query_ids)}; pass the searched ones"
        )
    return {
        query_id: {doc_ids[i]: s for s, i in zip(row_scores, row_indices, strict=True) if i >= 0}
        for query_id, row_scores, row_indices in zip(query_ids, scores.tolist(), indices.tolist(), strict=True)
    }
