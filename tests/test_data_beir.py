"""Reading BEIR folders: what is read, and one clear line for everything that is wrong."""

from __future__ import annotations

import gzip
import json

import pytest

from datamodules.beir import load_collection, merge_collections
from tests.data_helpers import ROOT, write_collection, write_lines


@pytest.fixture
def folder(tmp_path):
    return write_collection(tmp_path / "small", docs=6, queries=3)


def fails(folder, *parts, kind=ValueError):
    with pytest.raises(kind) as caught:
        load_collection(folder)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def test_bundled_scifact():
    collection = load_collection(ROOT / "data" / "scifact")
    assert len(collection.doc_ids) == 5183 and len(collection.queries) == 1109
    assert {split: len(qrels) for split, qrels in collection.qrels.items()} == {"train": 809, "test": 300}
    assert sum(map(len, collection.qrels["train"].values())) == 919
    assert collection.documents()[0] == f"{collection.titles[0]} {collection.texts[0]}"


def test_gzip_reads_the_same(folder, tmp_path):
    plain = load_collection(folder)
    for name in ("corpus.jsonl", "queries.jsonl"):
        (folder / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes()))
        (folder / name).unlink()
    assert load_collection(folder) == plain


def test_missing_folder(tmp_path):
    fails(tmp_path / "absent", "data.path", "absent", "is no folder", kind=FileNotFoundError)


def test_empty_folder(tmp_path):
    fails(tmp_path, "corpus.jsonl", "an empty folder", kind=FileNotFoundError)


def test_missing_queries(folder):
    (folder / "queries.jsonl").unlink()
    fails(folder, "queries.jsonl", "qrels", kind=FileNotFoundError)


def test_empty_file(folder):
    (folder / "corpus.jsonl").write_text("")
    fails(folder, "at least one document", "corpus.jsonl")


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("{bad", ("corpus.jsonl line 2", "a JSON object", "'{bad'")),
        ("[1]", ("corpus.jsonl line 2", "a JSON object")),
        ('{"text": "x"}', ("line 2", "'_id'", "no such key")),
        ('{"_id": "q", "text": 3}', ("line 2", "'text'", "got 3")),
        ('{"_id": "q", "title": " ", "text": ""}', ("line 2", "document 'q' with neither")),
        ('{"_id": "d0", "text": "x"}', ("line 2", "'d0' a second time")),
    ],
)
def test_malformed_corpus_line(folder, line, parts):
    first = (folder / "corpus.jsonl").read_text().splitlines()[0]
    write_lines(folder / "corpus.jsonl", [first, line])
    fails(folder, *parts)


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("nonsense", ("queries.jsonl line 1", "a JSON object")),
        ('{"_id": "q", "text": "  "}', ("queries.jsonl line 1", "query 'q' with none")),
    ],
)
def test_malformed_query_line(folder, line, parts):
    write_lines(folder / "queries.jsonl", [line])
    fails(folder, *parts)


def test_bytes_that_are_not_utf8(folder):
    (folder / "queries.jsonl").write_bytes(b'{"_id": "q", "text": "\xff"}\n')
    fails(folder, "queries.jsonl line 1", "UTF-8", "0xff")


def test_broken_gzip(folder):
    (folder / "corpus.jsonl").rename(folder / "kept")
    (folder / "corpus.jsonl.gz").write_bytes(gzip.compress((folder / "kept").read_bytes())[:-12])
    fails(folder, "corpus.jsonl.gz", "a complete gzip file")


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        (["train0 d0 1"], ("train.tsv line 2", "three fields", "1:")),
        (["train0\td0\tyes"], ("train.tsv line 2", "a whole number", "'yes'")),
        (["train0\td0\t1", "nobody\td0\t1", "train1\tnothing\t1"], ("got 2 unknown", "query 'nobody' in line 3")),
        (["train0\tnothing\t1"], ("got 1 unknown", "document 'nothing' in line 2")),
        (["train0\td0\t0", "train1\td0\t1"], ("score >= 1", "query 'train0'")),
        ([], ("at least one judgement",)),
    ],
)
def test_malformed_qrels(folder, rows, parts):
    write_lines(folder / "qrels" / "train.tsv", ["query-id\tcorpus-id\tscore", *rows])
    fails(folder, *parts)


def test_qrels_without_header(folder):
    write_lines(folder / "qrels" / "train.tsv", ["train0\td0\t1"])
    fails(folder, "train.tsv line 1", "the header")


def test_numeric_ids_and_missing_title(tmp_path):
    write_lines(tmp_path / "corpus.jsonl", [json.dumps({"_id": 7, "text": "x"})])
    write_lines(tmp_path / "queries.jsonl", [json.dumps({"_id": 1, "text": "y"})])
    collection = load_collection(tmp_path)
    assert collection.doc_ids == ["7"] and collection.documents() == ["x"] and collection.qrels == {}


def test_merge_prefixes_ids(tmp_path):
    a, b = (load_collection(write_collection(tmp_path / name, docs=3, queries=2)) for name in "ab")
    merged = merge_collections([a, b])
    assert merged.doc_ids == ["a/d0", "a/d1", "a/d2", "b/d0", "b/d1", "b/d2"]
    assert merged.qrels["train"]["b/train1"] == {"b/d1": 1, "b/d2": 1}
    with pytest.raises(ValueError, match="different names"):
        merge_collections([a, a])
