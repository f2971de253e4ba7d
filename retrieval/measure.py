"""Measures of a run and of vectors: effectiveness by ir_measures, sparsity, and the run file in TREC's format."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

import ir_measures
import numpy as np
import scipy.sparse as sp

Run = Mapping[str, Mapping[str, float]]

MEASURES = {
    "ndcg@10": ir_measures.nDCG @ 10,
    "mrr@10": ir_measures.RR @ 10,
    "recall@100": ir_measures.R @ 100,
    "recall@1000": ir_measures.R @ 1000,
}


def measure(qrels: Mapping[str, Mapping[str, int]], run: Run) -> dict[str, float]:
    """nDCG@10, MRR@10, recall@100 and recall@1000 as trec_eval computes them, averaged over the queries of ``qrels``.

    A query without results counts as 0; results of queries that ``qrels`` doesn't name are ignored.

    Args:
        qrels: query id -> document id -> grade.
        run: query id -> document id -> score.

    Raises:
        ValueError: if there are no judgements.
    """
    if not qrels:
        raise ValueError("qrels: expected judgements of at least one query, got none; choose a split with qrels")
    found = {query_id: run[query_id] for query_id in qrels if run.get(query_id)}
    totals = dict.fromkeys(MEASURES.values(), 0.0)
    if found:
        judged = {query_id: dict(qrels[query_id]) for query_id in found}
        for metric in ir_measures.iter_calc(list(totals), judged, found):
            totals[metric.measure] += metric.value
    return {name: totals[wanted] / len(qrels) for name, wanted in MEASURES.items()}


def sparsity(queries: sp.csr_matrix, docs: sp.csr_matrix) -> dict[str, float]:
    """Mean number of active dimensions of both sides, and the expected number of products per query-document pair.

    The latter is sum_v p_q(v) p_d(v), where p(v) is the share of texts in which dimension v is active
    (Paria et al. 2020, arXiv 2004.05665, section 3). It is not the FLOPS regulariser.

    Args:
        queries: (Q, V) sparse.
        docs: (n, V) sparse.

    Returns:
        ``active_dims_query``, ``active_dims_doc``, ``flops``.
    """
    shares = [_active_share(matrix) for matrix in (queries, docs)]
    return {
        "active_dims_query": float(shares[0].sum()),
        "active_dims_doc": float(shares[1].sum()),
        "flops": float(shares[0] @ shares[1]),
    }


def _active_share(matrix: sp.csr_matrix) -> np.ndarray:
    """(V,) float64: in which share of the rows a column is active."""
    active = matrix.indices[matrix.data != 0]
    return np.bincount(active, minlength=matrix.shape[1]) / max(1, matrix.shape[0])


def write_trec_run(path: str | Path, run: Run, tag: str) -> None:
    """Writes ``query-id Q0 document-id rank score tag``, one result per line, best first.

    White space divides the columns: in an id it is written percent-encoded, ``a b`` as ``a%20b``.

    Args:
        path: the file; its folder is made.
        run: query id -> document id -> score.
        tag: name of the run; white space in it becomes "-".
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    name = "-".join(tag.split()) or "run"
    with path.open("w", encoding="utf-8") as file:
        for query_id, results in run.items():
            ranked = sorted(results.items(), key=lambda item: -item[1])
            for rank, (doc_id, score) in enumerate(ranked, start=1):
                file.write(f"{_one_word(query_id)} Q0 {_one_word(doc_id)} {rank} {score:.9g} {name}\n")


def _one_word(name: str) -> str:
    return re.sub(r"\s", lambda space: quote(space[0]), name)
