"""The fixed pool that validation searches during training: what is in it, and batches of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from datamodules.beir import Collection, Qrels
from datamodules.collate import TextBatch, TextTokenizer
from datamodules.splits import digest

BM25_DEPTH = 20  # documents per query that make the pool hard


@dataclass(frozen=True)
class Pool:
    """Queries and documents of a validation.

    Attributes:
        query_ids: ids of the queries.
        queries: their texts.
        doc_ids: ids of the documents.
        docs: their texts.
        qrels: query id -> document id -> grade, for these queries.
        description: how the pool was made, in a few words.
    """

    query_ids: list[str]
    queries: list[str]
    doc_ids: list[str]
    docs: list[str]
    qrels: Qrels
    description: str


def build_pool(collection: Collection, dev_qrels: Qrels, size: int, max_queries: int, seed: int) -> Pool:
    """Relevant documents of dev queries, their BM25 top 20, and others drawn at random up to ``size`` documents.

    Args:
        collection: where the texts are.
        dev_qrels: judgements of the dev queries.
        size: documents in the pool; relevant ones are all in it even if they are more.
        max_queries: at most so many queries, those with the smallest hash of their id.
        seed: for the random part.
    """
    query_ids = sorted(dev_qrels, key=digest)[:max_queries]
    documents = collection.documents()
    position = {doc_id: index for index, doc_id in enumerate(collection.doc_ids)}
    qrels = {query_id: {d: g for d, g in dev_qrels[query_id].items() if g >= 1} for query_id in query_ids}
    chosen = dict.fromkeys(position[doc_id] for grades in qrels.values() for doc_id in grades)
    relevant = len(chosen)
    queries = [collection.queries[query_id] for query_id in query_ids]
    if relevant < size:
        ranked = bm25_top(documents, queries, BM25_DEPTH)
        candidates = (doc for rank in zip(*ranked, strict=True) for doc in rank if doc >= 0)
        _fill(chosen, candidates, size)
    similar = len(chosen) - relevant
    _fill(chosen, np.random.default_rng([seed, len(documents)]).permutation(len(documents)).tolist(), size)
    docs = list(chosen)
    return Pool(
        query_ids=query_ids,
        queries=queries,
        doc_ids=[collection.doc_ids[index] for index in docs],
        docs=[documents[index] for index in docs],
        qrels=qrels,
        description=f"{relevant:,} relevant, {similar:,} of BM25, {len(docs) - relevant - similar:,} random",
    )


def bm25_top(documents: Sequence[str], queries: Sequence[str], k: int) -> list[list[int]]:
    """The positions of the best ``k`` documents for each query by BM25, -1 where fewer match."""
    from retrieval.bm25 import bm25_search  # only here: bm25s is not needed for data without a pool or negatives

    _, indices = bm25_search(documents, queries, min(k, len(documents)))
    return np.asarray(indices).tolist()


def _fill(chosen: dict[int, None], candidates: Iterator[int] | Sequence[int], size: int) -> None:
    for candidate in candidates:
        if len(chosen) >= size:
            return
        chosen.setdefault(candidate)


class PoolLoader:
    """Yields ("query" | "doc", TextBatch) over a pool, shortest texts first; tokenised once and kept.

    Args:
        pool: queries and documents.
        tokenize_query: for the queries.
        tokenize_doc: for the documents.
        batch_size: texts in a batch.
    """

    def __init__(self, pool: Pool, tokenize_query: TextTokenizer, tokenize_doc: TextTokenizer, batch_size: int):
        if batch_size < 1:
            raise ValueError(
                f"data.eval_batch_size: expected a number >= 1, got {batch_size}; set data.eval_batch_size=64"
            )
        query_order = np.argsort(tokenize_query.lengths(pool.queries), kind="stable").tolist()
        doc_order = np.argsort(tokenize_doc.lengths(pool.docs), kind="stable").tolist()
        self.query_ids = [pool.query_ids[index] for index in query_order]
        self.doc_ids = [pool.doc_ids[index] for index in doc_order]
        self._batches: list[tuple[str, TextBatch]] = []
        for side, tokenize, texts, order in (
            ("query", tokenize_query, pool.queries, query_order),
            ("doc", tokenize_doc, pool.docs, doc_order),
        ):
            for start in range(0, len(order), batch_size):
                batch = tokenize([texts[index] for index in order[start : start + batch_size]])
                self._batches.append((side, batch))

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[str, TextBatch]]:
        return iter(self._batches)
