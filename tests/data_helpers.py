"""Small collections and tokenizers that the tests of the data modules share."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

from datamodules.collate import TextTokenizer

ROOT = Path(__file__).resolve().parent.parent
WORDS = "cell protein gene mouse human tumor blood brain heart liver virus drug dose risk age bone".split()


@lru_cache(maxsize=1)
def bundled_tokenizer():
    """The tokenizer in data/tiny."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "data" / "tiny")


def loader_arguments(**changes) -> dict:
    """The keywords that every data module needs, small."""
    arguments = {
        "tokenize_query": TextTokenizer(bundled_tokenizer(), 16),
        "tokenize_doc": TextTokenizer(bundled_tokenizer(), 32),
        "seed": 3,
        "batch_size": 4,
        "val_pool": 12,
        "max_val_queries": 5,
        "eval_batch_size": 8,
    }
    return {**arguments, **changes}


def words(number: int, count: int = 5) -> str:
    """A text that differs from number to number."""
    return " ".join(WORDS[(number * 7 + k * (number + 3)) % len(WORDS)] for k in range(count)) + f" {number}"


def write_lines(path: Path, lines: list[str]) -> Path:
    """Writes ``lines`` with their ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def write_collection(
    folder: Path, docs: int = 30, queries: int = 20, splits: tuple[str, ...] = ("train", "test")
) -> Path:
    """A BEIR folder: query i of every split is relevant to documents i and i + 1; titles are made of other words."""
    corpus = [{"_id": f"d{i}", "title": f"title {words(i + 50, 3)}", "text": words(i, 8)} for i in range(docs)]
    write_lines(folder / "corpus.jsonl", [json.dumps(entry) for entry in corpus])
    entries = [{"_id": f"{split}{i}", "text": words(i, 4)} for split in splits for i in range(queries)]
    write_lines(folder / "queries.jsonl", [json.dumps(entry) for entry in entries])
    for split in splits:
        rows = [f"{split}{i}\td{(i + k) % docs}\t1" for i in range(queries) for k in (0, 1)]
        write_lines(folder / "qrels" / f"{split}.tsv", ["query-id\tcorpus-id\tscore", *rows])
    return folder
