"""How long the training pairs of a collection are, in tokens.  python -m benchmarks.lengths COLLECTION TOKENIZER OUT.csv"""

from __future__ import annotations

import csv
import sys
from collections import Counter

from transformers import AutoTokenizer

from datamodules.beir import load_collection

LONGEST = 512  # positions of BERT and XLM-R, special tokens included


def histogram(collection: str, tokenizer: str) -> list[tuple[str, int, int]]:
    """Rows (side, tokens, texts): of the training queries, and of the documents judged relevant to them.

    Args:
        collection: folder in the BEIR layout.
        tokenizer: folder or hub id; texts are cut at LONGEST tokens.
    """
    data, encode = load_collection(collection), AutoTokenizer.from_pretrained(tokenizer)
    place = {name: number for number, name in enumerate(data.doc_ids)}
    pairs = [(query, doc) for query, docs in data.qrels["train"].items() for doc, grade in docs.items() if grade > 0]
    documents = data.documents()
    sides = {
        "query": [data.queries[query] for query, _ in pairs],
        "doc": [documents[place[doc]] for _, doc in pairs],
    }
    rows = []
    for side, texts in sides.items():
        ids = encode(texts, truncation=True, max_length=LONGEST)["input_ids"]
        rows += [(side, length, texts) for length, texts in sorted(Counter(map(len, ids)).items())]
    return rows


def main() -> None:
    """Writes the rows."""
    if len(sys.argv) != 4:
        sys.exit("usage: python -m benchmarks.lengths COLLECTION TOKENIZER OUT.csv")
    rows = histogram(sys.argv[1], sys.argv[2])
    with open(sys.argv[3], "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("side", "tokens", "texts"))
        writer.writerows(rows)
    for side in ("query", "doc"):
        counts = [(tokens, texts) for which, tokens, texts in rows if which == side]
        total = sum(texts for _, texts in counts)
        print(f"{side}: {total:,} texts, {sum(a * b for a, b in counts) / total:.1f} tokens on average")


if __name__ == "__main__":
    main()
