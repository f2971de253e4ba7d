"""An index on disk: sparse vectors, their ids and the vocabulary, in three files that any tool can read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import scipy.sparse as sp
from torch import nn

VECTORS, IDS, VOCABULARY = "vectors.npz", "ids.txt", "vocabulary.json"


@dataclass(frozen=True)
class Index:
    """Vectors of n texts.

    Attributes:
        vectors: (n, V) float32.
        ids: n ids, in the vectors' order.
        vocabulary: V tokens, one per dimension.
    """

    vectors: sp.csr_matrix
    ids: list[str]
    vocabulary: list[str]

    def save(self, folder: str | Path) -> None:
        """Writes vectors.npz (``scipy.sparse.load_npz``), ids.txt (one per line) and vocabulary.json (a list).

        Raises:
            ValueError: if an id contains a line break, which ids.txt can't hold.
        """
        broken = next((name for name in self.ids if len(name.splitlines()) > 1), None)
        if broken is not None:
            raise ValueError(f"ids: expected ids without line breaks, got {broken!r}; rename it in the corpus")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        sp.save_npz(folder / VECTORS, self.vectors)
        (folder / IDS).write_text("".join(f"{name}\n" for name in self.ids), encoding="utf-8")
        (folder / VOCABULARY).write_text(json.dumps(self.vocabulary, ensure_ascii=False), encoding="utf-8")


def load_index(folder: str | Path) -> Index:
    """Reads what :meth:`Index.save` wrote.

    Raises:
        FileNotFoundError: if one of the three files is missing.
        ValueError: if their sizes don't fit together.
    """
    folder = Path(folder)
    missing = [name for name in (VECTORS, IDS, VOCABULARY) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"index: expected {VECTORS}, {IDS} and {VOCABULARY} in {folder}, got none named {', '.join(missing)}; make"
            " them with encode.py"
        )
    vectors = sp.csr_matrix(sp.load_npz(folder / VECTORS))
    ids = (folder / IDS).read_text(encoding="utf-8").splitlines()
    vocabulary = json.loads((folder / VOCABULARY).read_text(encoding="utf-8"))
    if vectors.shape != (len(ids), len(vocabulary)):
        raise ValueError(
            f"index: expected vectors of shape {(len(ids), len(vocabulary))} in {folder}, as many as ids and words, got"
            f" {vectors.shape}; encode again"
        )
    return Index(vectors, ids, vocabulary)


def vocabulary_of(encoder: nn.Module) -> list[str]:
    """The token of each dimension of a SparseEncoder; ``<id>`` where the head is wider than the tokenizer."""
    size = encoder.vocab_size
    known = min(size, len(encoder.tokenizer))
    tokens = encoder.tokenizer.convert_ids_to_tokens(list(range(known))) + [None] * (size - known)
    return [f"<{position}>" if token is None else token for position, token in enumerate(tokens)]


def matching_terms(
    query: sp.csr_matrix, doc: sp.csr_matrix, vocabulary: Sequence[str], n: int
) -> list[tuple[str, float]]:
    """The ``n`` words that contribute most to a score, with their contributions, largest first.

    Args:
        query: (1, V).
        doc: (1, V).
        vocabulary: V tokens.
        n: how many at most.
    """
    products = sp.csr_matrix(query.multiply(doc))
    ranked = sorted(zip(-products.data, products.indices, strict=True))[:n]
    return [(vocabulary[position], float(-negative)) for negative, position in ranked]
