"""Exact search against brute force, ties, chunks, and its memory at 100,000 documents."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval import search as module
from retrieval.search import best_k, ranked_run, search

ROOT = Path(__file__).parents[1]


def brute_force(queries: np.ndarray, docs: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    scores = np.zeros((len(queries), k), dtype=np.float32)
    indices = np.full((len(queries), k), -1, dtype=np.int64)
    for row, products in enumerate(queries.astype(np.float64) @ docs.astype(np.float64).T):
        order = [i for i in sorted(range(len(docs)), key=lambda i: (-products[i], i)) if products[i] > 0][:k]
        scores[row, : len(order)], indices[row, : len(order)] = products[order], order
    return scores, indices


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    size=st.tuples(st.integers(1, 9), st.integers(1, 60), st.integers(1, 12)),
    k=st.integers(1, 70),
    chunks=st.tuples(st.integers(1, 4), st.integers(1, 20)),
)
def test_search_is_brute_force(seed, size, k, chunks):
    """Small whole weights make many exact ties, which must go to the lower index across chunks too."""
    rng = np.random.default_rng(seed)
    queries, docs = (rng.integers(0, 3, (n, size[2])) * (rng.random((n, size[2])) < 0.4) for n in size[:2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "QUERY_CHUNK", chunks[0])
        patch.setattr(module, "DOC_CHUNK", chunks[1])
        scores, indices = search(sp.csr_matrix(queries), sp.csr_matrix(docs), k)
    wanted_scores, wanted_indices = brute_force(queries, docs, k)
    assert (scores.dtype, indices.dtype) == (np.float32, np.int64)
    np.testing.assert_array_equal(indices, wanted_indices)
    np.testing.assert_array_equal(scores, wanted_scores)


def test_search_of_real_weights():
    rng = np.random.default_rng(0)
    queries, docs = (sp.random(n, 500, 0.05, "csr", np.float32, rng) for n in (40, 3000))
    scores, _ = search(queries, docs, 100)
    wanted, _ = brute_force(queries.toarray(), docs.toarray(), 100)
    np.testing.assert_allclose(scores, wanted, rtol=1e-5)


def test_search_without_any_match():
    scores, indices = search(sp.csr_matrix((2, 4)), sp.csr_matrix(np.eye(4)), 3)
    assert not scores.any()
    assert (indices == -1).all()


def test_search_rejects():
    with pytest.raises(ValueError, match="vocabulary of 4 words, got 5"):
        search(sp.csr_matrix((1, 4)), sp.csr_matrix((1, 5)), 1)
    with pytest.raises(ValueError, match="k: expected"):
        search(sp.csr_matrix((1, 4)), sp.csr_matrix((1, 4)), 0)


def test_best_k_keeps_the_lowest_index_of_a_tie_at_the_border():
    scores, indices = best_k(np.array([1.0, 2.0, 1.0, 1.0, -1.0]), np.array([9, 8, 3, 5, 0]), 2)
    assert scores.tolist() == [2.0, 1.0]
    assert indices.tolist() == [8, 3]


def test_ranked_run_leaves_missing_results_out():
    run = ranked_run(np.array([[2.0, 1.0], [0.5, 0.0]]), np.array([[1, 0], [0, -1]]), ["q", "r"], ["a", "b"])
    assert run == {"q": {"b": 2.0, "a": 1.0}, "r": {"a": 0.5}}
    with pytest.raises(ValueError, match="query_ids"):
        ranked_run(np.zeros((1, 1)), np.zeros((1, 1), dtype=int), ["q", "r"], ["a"])


LARGE = """
import resource, sys
import numpy as np, scipy.sparse as sp
from retrieval.search import search
rng = np.random.default_rng(0)
def vectors(n, active, V=30_522):
    # Log-uniform words: a few are in nearly every text, as in real ones.
    words = np.exp(rng.random((n, active), dtype=np.float32) * np.log(V)).astype(np.int32) - 1
    matrix = sp.csr_matrix((rng.random(n * active, dtype=np.float32), words.ravel(),
                            np.arange(0, n * active + 1, active)), shape=(n, V))
    matrix.sum_duplicates()
    return matrix
scores, indices = search(vectors(300, 30), vectors(100_000, 150), 1000)
assert scores.shape == (300, 1000) and (indices >= 0).all()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(peak * (1 if sys.platform == "darwin" else 1024))
"""


def test_search_of_100_000_documents_fits_in_4_gb():
    """A process of its own: the peak of this one already holds whatever ran before."""
    pytest.importorskip("resource")
    done = subprocess.run([sys.executable, "-c", LARGE], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 4e9
