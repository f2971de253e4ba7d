"""Search an index from the command line: `python search.py index=<folder> model_path=<model> query="..."`."""

from __future__ import annotations

from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_modules.launch import main
from retrieval.encode import encode_texts, resolve_compute
from retrieval.export import load_encoder
from retrieval.index import load_index, matching_terms, vocabulary_of
from retrieval.search import search


def task(cfg: DictConfig) -> None:
    """Prints the best documents with their scores and the words that contribute most to each."""
    for name in ("index", "model_path", "query"):
        if not str(cfg[name] or "").strip():
            raise ValueError(f"{name}: expected a value, got nothing; add {name}=<value>")
    device, autocast_dtype = resolve_compute(cfg.device, cfg.precision)
    index = load_index(cfg.index)
    encoder = load_encoder(cfg.model_path, head=cfg.head.name)
    if vocabulary_of(encoder) != index.vocabulary:
        raise ValueError(
            f"model_path: expected the model that made the index in {cfg.index}, got one with another vocabulary;"
            " give the same model_path as to encode.py"
        )
    query = encode_texts(encoder, [str(cfg.query)], "query", device=device, autocast_dtype=autocast_dtype)
    scores, found = search(query, index.vectors, cfg.k)
    table = Table("rank", "document", "score", "terms")
    for rank, (score, row) in enumerate(zip(scores[0], found[0], strict=True), start=1):
        if row >= 0:
            terms = matching_terms(query, index.vectors[row], index.vocabulary, cfg.terms)
            words = ", ".join(f"{word} {share:.2f}" for word, share in terms)
            table.add_row(str(rank), escape(index.ids[row]), f"{score:.3f}", escape(words))
    console = Console()
    console.print(table if table.row_count else "no document shares a term with the query")


if __name__ == "__main__":
    main(task, config_name="search")
