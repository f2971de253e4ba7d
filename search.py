"""Search an index from the command line: `python search.py index=<folder> model_path=<model> query="..."`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import scipy.sparse as sp
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_modules.encoder import resolve_head
from lightning_modules.launch import main
from retrieval.encode import encode_texts, resolve_compute
from retrieval.export import load_encoder
from retrieval.index import Index, load_index, matching_terms, vocabulary_of
from retrieval.search import search


def read_queries(query: object, queries: object) -> list[str]:
    """The text of ``query=``, or the lines of the file of ``queries=`` that aren't blank.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if both or neither are given, or the file holds no query.
    """
    given = [str(value or "").strip() for value in (query, queries)]
    if bool(given[0]) == bool(given[1]):
        raise ValueError(
            f"query: expected either query=<text> or queries=<file>, got {'both' if given[0] else 'neither'}; give one"
        )
    if given[0]:
        return [given[0]]
    path = Path(given[1]).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"queries: expected a text file, got {path}, which is no file; correct queries")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"queries: expected text in UTF-8, got other bytes in {path}; convert the file") from error
    texts = [line for line in lines if line]
    if not texts:
        raise ValueError(f"queries: expected one query per line, got no text in {path}; add a query")
    return texts


def ranking(
    index: Index, text: str, query: sp.csr_matrix, scores: np.ndarray, rows: np.ndarray, terms: int
) -> Table | str:
    """A table of one query's documents, best first, with the words that contribute most to each.

    Args:
        index: what was searched.
        text: the query.
        query: (1, V), its vector.
        scores: (k,).
        rows: (k,) of ``index.vectors``, -1 where there are fewer documents.
        terms: how many words at most.
    """
    if rows[0] < 0:
        return f"{escape(text)}: no document shares a term with the query"
    table = Table("rank", "document", "score", "terms", title=escape(text))
    for rank, (score, row) in enumerate(zip(scores, rows, strict=True), start=1):
        if row >= 0:
            shares = matching_terms(query, index.vectors[row], index.vocabulary, terms)
            words = ", ".join(f"{word} {share:.2f}" for word, share in shares)
            table.add_row(str(rank), escape(index.ids[row]), f"{score:.3f}", escape(words))
    return table


def task(cfg: DictConfig) -> None:
    """Prints the best documents of each query."""
    for name in ("index", "model_path"):
        if not str(cfg[name] or "").strip():
            raise ValueError(f"{name}: expected a value, got nothing; add {name}=<value>")
    texts = read_queries(cfg.query, cfg.queries)
    device, autocast_dtype = resolve_compute(cfg.device, cfg.precision)
    index = load_index(cfg.index)
    encoder = load_encoder(cfg.model_path, head=resolve_head(cfg.head.name, device))
    if vocabulary_of(encoder) != index.vocabulary:
        raise ValueError(
            f"model_path: expected the model that made the index in {cfg.index}, got one with another vocabulary;"
            " give the same model_path as to encode.py"
        )
    vectors = encode_texts(encoder, texts, "query", device=device, autocast_dtype=autocast_dtype)
    scores, rows = search(vectors, index.vectors, cfg.k)
    console = Console()
    for number, text in enumerate(texts):
        console.print(ranking(index, text, vectors[number], scores[number], rows[number], cfg.terms))


if __name__ == "__main__":
    main(task, config_name="search")
