"""Measures against numbers computed by hand, BM25 on SciFact, evaluation of a collection, the table."""

from __future__ import annotations

import io
from math import log2
from pathlib import Path

import ir_measures
import numpy as np
import pytest
import scipy.sparse as sp
from rich.console import Console
from test_retrieval_encode import BagOfWords

from datamodules.beir import Collection, load_collection
from retrieval.bm25 import bm25_search
from retrieval.evaluate import evaluate_bm25, evaluate_collection, open_collection
from retrieval.measure import measure, sparsity, write_trec_run
from retrieval.report_table import results_table

SCIFACT = Path(__file__).parents[1] / "data" / "scifact"


@pytest.fixture
def collection():
    docs = {"d1": "vitamin d and falls", "d2": "protein binding in cells", "d3": "gene expression in mice"}
    return Collection(
        "small",
        list(docs),
        ["", "binding", ""],
        list(docs.values()),
        {"q1": "does vitamin d prevent falls", "q2": "gene expression", "q3": "protein"},
        {"test": {"q1": {"d1": 1}, "q2": {"d3": 1}}, "train": {"q3": {"d2": 1}}},
    )


def test_measure_by_hand():
    qrels = {"q1": {"a": 1, "b": 1}, "q2": {"a": 1}, "q3": {"z": 1}}
    run = {"q1": {"x": 3.0, "a": 2.0, "b": 1.0}, "q2": {}, "other": {"a": 1.0}}
    ndcg = (1 / log2(3) + 1 / log2(4)) / (1 + 1 / log2(3))
    wanted = {"ndcg@10": ndcg / 3, "mrr@10": 0.5 / 3, "recall@100": 1 / 3, "recall@1000": 1 / 3}
    assert measure(qrels, run) == pytest.approx(wanted)
    assert set(measure(qrels, {}).values()) == {0.0}
    with pytest.raises(ValueError, match="qrels"):
        measure({}, run)


def test_sparsity_by_hand():
    queries = sp.csr_matrix(np.array([[1.0, 0, 2], [0, 0, 3]]))
    docs = sp.csr_matrix(np.array([[1.0, 1, 1], [0, 0, 1], [0, 0, 1], [0, 0, 0]]))
    figures = sparsity(queries, docs)
    assert figures == {"active_dims_query": 1.5, "active_dims_doc": 1.25, "flops": 0.5 * 0.25 + 1 * 0.75}
    pairs = (queries > 0).astype(int) @ (docs > 0).astype(int).T
    assert figures["flops"] == pytest.approx(pairs.toarray().mean())


def test_run_file_is_read_back(tmp_path):
    run = {"q1": {"a": 0.1234567, "b": 3.0}, "q2": {"c": 1.0}}
    write_trec_run(tmp_path / "new" / "run.trec", run, "my run")
    lines = (tmp_path / "new" / "run.trec").read_text().splitlines()
    assert lines[:2] == ["q1 Q0 b 1 3 my-run", "q1 Q0 a 2 0.1234567 my-run"]
    read = {(r.query_id, r.doc_id): r.score for r in ir_measures.read_trec_run(str(tmp_path / "new" / "run.trec"))}
    assert read == {("q1", "a"): 0.1234567, ("q1", "b"): 3.0, ("q2", "c"): 1.0}


def test_bm25_on_scifact():
    """0.680 is what the collection's README states for the test split, and recall@100 0.922."""
    figures, run = evaluate_bm25(load_collection(SCIFACT), "test")
    assert figures["ndcg@10"] == pytest.approx(0.6804, abs=5e-4)
    assert figures["recall@100"] == pytest.approx(0.922, abs=5e-4)
    assert set(figures) == {"ndcg@10", "mrr@10", "recall@100", "recall@1000"}
    assert len(run) == 300


def test_bm25_score_by_hand():
    """Lucene's form: ln(1 + (n - df + 0.5) / (df + 0.5)) * tf / (tf + k1 (1 - b + b length / mean length))."""
    docs = ["gene gene mice", "gene", "protein"]
    scores, indices = bm25_search(docs, ["genes", "of the", "unknown"], 4)
    idf = np.log(1 + 1.5 / 2.5)
    mean = 5 / 3
    wanted = [idf * tf / (tf + 0.9 * (0.6 + 0.4 * length / mean)) for tf, length in ((2, 3), (1, 1))]
    order = np.argsort(-np.array(wanted))
    np.testing.assert_allclose(scores[0], [*np.array(wanted)[order], 0, 0], rtol=1e-5)
    assert indices.tolist() == [[*order.tolist(), -1, -1], [-1] * 4, [-1] * 4]


def test_bm25_ties_and_bad_input():
    assert bm25_search(["mice", "cells", "mice"], ["mice"], 1)[1].tolist() == [[0]]
    assert bm25_search(["the", "of"], ["mice"], 1)[1].tolist() == [[-1]]
    with pytest.raises(ValueError, match="doc_texts"):
        bm25_search([], ["mice"], 1)
    with pytest.raises(ValueError, match="k: expected"):
        bm25_search(["mice"], ["mice"], 0)


def test_evaluate_collection(collection, tmp_path):
    figures, run = evaluate_collection(BagOfWords(), collection, "test", output_dir=tmp_path, progress=False)
    assert figures["ndcg@10"] == figures["mrr@10"] == figures["recall@1000"] == 1.0
    assert 2 <= figures["active_dims_query"] <= 8
    assert 3 <= figures["active_dims_doc"] <= 8
    assert list(run) == ["q1", "q2"]
    assert next(iter(run["q2"])) == "d3"
    assert (tmp_path / "run.trec").read_text().startswith("q1 Q0 d1 1 ")


def test_missing_split_names_the_present_ones(collection):
    with pytest.raises(ValueError, match=r"small has \(test, train\), got 'dev'"):
        evaluate_bm25(collection, "dev")
    with pytest.raises(ValueError, match=r"small has \(test, train\), got 'dev'"):
        evaluate_collection(BagOfWords(), collection, "dev")


def test_open_collection(tmp_path):
    for path in (None, "", ["a", "b"]):
        with pytest.raises(ValueError, match="data.path: expected one folder"):
            open_collection(path)
    with pytest.raises(FileNotFoundError, match="data.path"):
        open_collection(tmp_path / "none")


def test_table():
    table = results_table({"BM25": {"ndcg@10": 0.68044}, "trained": {"ndcg@10": 0.7, "flops": 1.234}}, title="SciFact")
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table)
    text = console.export_text()
    for word in ("nDCG@10", "MRR@10", "recall@100", "active dims query", "active dims doc", "FLOPS", "0.680", "1.23"):
        assert word in text
    assert " - " in next(line for line in text.splitlines() if "BM25" in line)
