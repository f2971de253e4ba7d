"""BM25 over English text: the baseline beside every table, and where hard documents come from."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from retrieval.search import best_k

WORD = r"(?u)\b\w+\b"  # one character is a word too, unlike bm25s' default: "vitamin d" needs it


def bm25_search(
    doc_texts: Sequence[str], query_texts: Sequence[str], k: int, *, k1: float = 0.9, b: float = 0.4
) -> tuple[np.ndarray, np.ndarray]:
    """The ``k`` best documents of each query by BM25 in Lucene's form (Robertson and Zaragoza 2009).

    Words are lower-cased, without English stop words, stemmed by Snowball.

    Args:
        doc_texts: n texts.
        query_texts: Q texts.
        k: how many; may exceed n.
        k1: how slowly a repeated word saturates.
        b: how much a long document is discounted, 0 to 1.

    Returns:
        scores (Q, k) float32 and indices (Q, k) int64, as :func:`retrieval.search.search` gives them: ties go to
        the lower index, -1 where fewer documents share a word with the query.

    Raises:
        ValueError: if there is no document or ``k`` is below 1.
    """
    # Where jax is installed, bm25s starts it at import, and it would take three quarters of the GPU's memory.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import bm25s
    import Stemmer

    if not doc_texts:
        raise ValueError("doc_texts: expected at least one document, got none; check the collection")
    if k < 1:
        raise ValueError(f"k: expected a number >= 1, got {k}; ask for at least one document")
    stemmer = Stemmer.Stemmer("english")
    docs, queries = (
        bm25s.tokenize(
            list(texts), token_pattern=WORD, stopwords="en", stemmer=stemmer, return_ids=False, show_progress=False
        )
        for texts in (doc_texts, query_texts)
    )
    scores = np.zeros((len(queries), k), dtype=np.float32)
    indices = np.full((len(queries), k), -1, dtype=np.int64)
    vocabulary = {word for words in docs for word in words}
    if not vocabulary:
        return scores, indices
    index = bm25s.BM25(k1=k1, b=b, method="lucene")
    index.index(docs, show_progress=False)
    positions = np.arange(len(docs))
    for row, words in enumerate(queries):
        known = [word for word in words if word in vocabulary]
        if known:
            best_scores, best_indices = best_k(index.get_scores(known), positions, k)
            scores[row, : len(best_scores)], indices[row, : len(best_indices)] = best_scores, best_indices
    return scores, indices
