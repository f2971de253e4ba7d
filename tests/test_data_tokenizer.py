"""The bundled tokenizer: made again it is the same, byte for byte, and it never saw a test query."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.data_helpers import ROOT, bundled_tokenizer


def test_making_it_again_gives_the_same_files(tmp_path):
    command = [sys.executable, str(ROOT / "data" / "make_tokenizer.py"), "--output", str(tmp_path)]
    subprocess.run(command, check=True, timeout=240)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (ROOT / "data" / "tiny" / name).read_bytes()


def test_it_is_a_bert_tokenizer_of_16000_words():
    tokenizer = bundled_tokenizer()
    assert len(tokenizer) == 16_000
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("Mice LACK receptors")["input_ids"])
    assert tokens == ["[CLS]", "mice", "lack", "receptors", "[SEP]"]


def test_test_queries_are_left_out():
    sys.path.insert(0, str(ROOT / "data"))
    try:
        from make_tokenizer import read_texts
    finally:
        sys.path.pop(0)
    texts = set(read_texts(ROOT / "data" / "scifact"))
    lines = (ROOT / "data" / "scifact" / "qrels" / "test.tsv").read_text().splitlines()[1:]
    test_ids = {line.split("\t")[0] for line in lines}
    queries = map(json.loads, (ROOT / "data" / "scifact" / "queries.jsonl").read_text().splitlines())
    found = {query["_id"] for query in queries if query["_id"] in test_ids and query["text"] in texts}
    assert found == {"870", "1292"}  # the two that SciFact itself repeats word for word among the train claims
