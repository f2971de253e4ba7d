"""Evaluation on a collection's split: encode once, search exactly, measure; BM25 the same way."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from datamodules.beir import Collection, Qrels, load_collection
from datamodules.groups import member_of, with_groups
from retrieval.bm25 import bm25_search
from retrieval.encode import SIDES, encode_texts
from retrieval.measure import Run, measure, sparsity, write_trec_run
from retrieval.search import ranked_run, search

DEPTH = 1000  # results per query, for recall@1000

Results = tuple[dict[str, float], dict[str, dict[str, float]]]


def open_collection(path: object, group_separator: str | None = None, same_group: str = "relevant") -> Collection:
    """The BEIR collection in the folder that ``data.path`` names.

    Args:
        path: the folder.
        group_separator, same_group: see :func:`datamodules.groups.with_groups`.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if ``path`` isn't one path, the folder's files are malformed, or there are no such groups.
    """
    if not isinstance(path, str | Path) or not str(path):
        raise ValueError(
            f"data.path: expected one folder in the BEIR layout, got {path}; use data=scifact or"
            " data=beir data.path=<folder>"
        )
    return with_groups(load_collection(path), group_separator, same_group)


def split_qrels(collection: Collection, split: str) -> Qrels:
    """Judgements of a split.

    Raises:
        ValueError: if the collection lacks it; the message names those it has.
    """
    if split not in collection.qrels:
        present = ", ".join(sorted(collection.qrels)) or "none"
        raise ValueError(
            f"split: expected one of those that {collection.name} has ({present}), got {split!r}; choose one of them or"
            f" add qrels/{split}.tsv"
        )
    return collection.qrels[split]


def effectiveness(collection: Collection, qrels: Qrels, run: Run) -> dict[str, float]:
    """What :func:`retrieval.measure.measure` says of all queries, and ``ndcg@10/<member>`` where ids have groups.

    The member is what stands after the separator in a query's id, such as its language: "q7/de" counts for
    ``ndcg@10/de``.
    """
    figures = measure(qrels, run)
    separator = collection.group_separator
    if separator is None:
        return figures
    parts: dict[str, Qrels] = {}
    for query_id, grades in qrels.items():
        parts.setdefault(member_of(query_id, separator), {})[query_id] = grades
    return figures | {f"ndcg@10/{name}": measure(parts[name], run)["ndcg@10"] for name in sorted(parts) if name}


def evaluate_collection(
    encoder: nn.Module,
    collection: Collection,
    split: str,
    *,
    batch_size: int = 64,
    batch_tokens: int | None = None,
    device: torch.device | str | None = None,
    output_dir: str | Path | None = None,
    progress: bool = True,
    autocast_dtype: torch.dtype | None = None,
) -> Results:
    """Ranks all documents for the queries of a split.

    Args:
        encoder: a SparseEncoder.
        collection: documents, queries, judgements.
        split: which queries.
        batch_size, batch_tokens, device, autocast_dtype: see :func:`retrieval.encode.encode_texts`.
        output_dir: where ``run.trec`` is written; None writes nothing.
        progress: show a bar per side.

    Returns:
        figures: ``ndcg@10``, ``mrr@10``, ``recall@100``, ``recall@1000``, ``active_dims_query``,
            ``active_dims_doc`` and ``flops``; ``ndcg@10/<member>`` where ids have groups.
        run: query id -> document id -> score, the best 1000.

    Raises:
        ValueError: if the collection lacks the split.
    """
    qrels = split_qrels(collection, split)
    texts = {"query": [collection.queries[query_id] for query_id in qrels], "doc": collection.documents()}
    vectors = {
        side: encode_texts(
            encoder,
            texts[side],
            side,
            batch_size=batch_size,
            batch_tokens=batch_tokens,
            device=device,
            progress=progress,
            autocast_dtype=autocast_dtype,
        )
        for side in SIDES
    }
    run = ranked_run(*search(vectors["query"], vectors["doc"], DEPTH), list(qrels), collection.doc_ids)
    if output_dir is not None:
        write_trec_run(Path(output_dir) / "run.trec", run, "sparton")
    return effectiveness(collection, qrels, run) | sparsity(vectors["query"], vectors["doc"]), run


def evaluate_bm25(collection: Collection, split: str) -> Results:
    """The same by BM25 (k1 0.9, b 0.4); figures of sparsity, which mean nothing for it, are left out.

    Raises:
        ValueError: if the collection lacks the split.
    """
    qrels = split_qrels(collection, split)
    queries = [collection.queries[query_id] for query_id in qrels]
    run = ranked_run(*bm25_search(collection.documents(), queries, DEPTH), list(qrels), collection.doc_ids)
    return effectiveness(collection, qrels, run), run
