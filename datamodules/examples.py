"""Training examples of a collection, and how a list of examples becomes a TrainBatch."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from datamodules.beir import Collection, Qrels
from datamodules.collate import TextTokenizer, TrainBatch


class Example(NamedTuple):
    """A query with K documents, the first of them relevant.

    Attributes:
        query: its text.
        docs: the positive, then the negatives.
        doc_keys: what identifies each document within the training data.
        relevant: keys of every document that is relevant to the query, as far as the training data says.
        scores: a teacher's score for each document, or None.
    """

    query: str
    docs: list[str]
    doc_keys: list[Hashable]
    relevant: frozenset[Hashable]
    scores: list[float] | None = None


class Source(Protocol):
    """A numbered set of examples, all with the same number of documents."""

    def __len__(self) -> int: ...

    def lengths(self, tokenize_query: TextTokenizer, tokenize_doc: TextTokenizer) -> np.ndarray:
        """(len(self),) int64, about how many tokens each example has."""


class ExampleSource(Source, Protocol):
    """A source of texts."""

    def example(self, index: int, rng: random.Random) -> Example:
        """Example ``index``; whatever is drawn comes from ``rng``."""


def make_train_batch(
    examples: Sequence[Example], tokenize_query: TextTokenizer, tokenize_doc: TextTokenizer
) -> TrainBatch:
    """Tokenises examples and marks the false negatives among their documents.

    A document of the batch is a false negative for a query when it is relevant to it without being the positive
    that the query came with: another query's positive (or negative) that the judgements call relevant to this one
    too, or the same document a second time.
    """
    columns: dict[Hashable, list[int]] = {}
    for column, key in enumerate(key for example in examples for key in example.doc_keys):
        columns.setdefault(key, []).append(column)
    docs = [doc for example in examples for doc in example.docs]
    per_query = len(docs) // len(examples)
    false_negatives = torch.zeros(len(examples), len(docs), dtype=torch.bool)
    for row, example in enumerate(examples):
        for key in example.relevant:
            false_negatives[row, columns.get(key, [])] = True
        false_negatives[row, row * per_query] = False
    scored = all(example.scores is not None for example in examples)
    return TrainBatch(
        query=tokenize_query([example.query for example in examples]),
        doc=tokenize_doc(docs),
        false_negatives=false_negatives,
        teacher_scores=torch.tensor([e.scores for e in examples], dtype=torch.float32) if scored else None,
    )


class LabelledPairs:
    """One example for every relevant (query, document) of some judgements.

    Args:
        collection: where the texts are.
        documents: ``collection.documents()``.
        qrels: the judgements of the training queries.
        negatives: documents (positions in the corpus) to draw negatives from, for each query id.
        count: how many negatives an example gets.
        related: judgements of the same queries that name every document which must not be a negative; None: ``qrels``.
    """

    def __init__(
        self,
        collection: Collection,
        documents: Sequence[str],
        qrels: Qrels,
        negatives: dict[str, list[int]] | None = None,
        count: int = 0,
        related: Qrels | None = None,
    ):
        position = {doc_id: index for index, doc_id in enumerate(collection.doc_ids)}
        self.documents = documents
        self.queries = {query_id: collection.queries[query_id] for query_id in qrels}

        def positions(judged: Qrels) -> dict[str, frozenset[int]]:
            return {
                query_id: frozenset(position[doc_id] for doc_id, grade in grades.items() if grade >= 1)
                for query_id, grades in judged.items()
            }

        positives = positions(qrels)
        self.relevant = positives if related is None else positions(related)
        self.pairs = [(query_id, doc) for query_id, docs in positives.items() for doc in sorted(docs)]
        self.negatives = negatives
        self.count = count

    def __len__(self) -> int:
        return len(self.pairs)

    def example(self, index: int, rng: random.Random) -> Example:
        query_id, positive = self.pairs[index]
        drawn = rng.sample(self.negatives[query_id], self.count) if self.count else []
        keys = [positive, *drawn]
        docs = [self.documents[key] for key in keys]
        return Example(self.queries[query_id], docs, keys, self.relevant[query_id])

    def lengths(self, tokenize_query: TextTokenizer, tokenize_doc: TextTokenizer) -> np.ndarray:
        queries = dict(zip(self.queries, tokenize_query.lengths(list(self.queries.values())), strict=True))
        used = sorted({doc for _, doc in self.pairs})
        docs = dict(zip(used, tokenize_doc.lengths([self.documents[doc] for doc in used]), strict=True))
        mean = sum(docs.values()) / len(docs)
        return np.array([queries[query] + docs[doc] + round(self.count * mean) for query, doc in self.pairs])


class TitlePairs:
    """One example for every document with a title and a text: the title asks for the text without it.

    This uses the text of the corpus alone, no judgement. Negatives, where every example needs some, are other
    documents drawn at random.

    Args:
        collection: where the texts are.
        positions: which documents of it to take, those without a title or a text left aside.
        count: how many negatives an example gets.
    """

    def __init__(self, collection: Collection, positions: Sequence[int], count: int = 0):
        self.titles = collection.titles
        self.texts = collection.texts
        self.usable = [index for index in positions if self.titles[index].strip() and self.texts[index].strip()]
        self.count = count
        if self.usable and count >= len(self.usable):
            raise ValueError(
                f"data.negatives: expected fewer than the {len(self.usable)} documents with title and text, got"
                f" {count}; lower data.negatives"
            )

    def __len__(self) -> int:
        return len(self.usable)

    def example(self, index: int, rng: random.Random) -> Example:
        own = self.usable[index]
        others = rng.sample(self.usable, self.count + 1) if self.count else []
        keys = [own, *[other for other in others if other != own][: self.count]]
        return Example(self.titles[own], [self.texts[key] for key in keys], keys, frozenset([own]))

    def lengths(self, tokenize_query: TextTokenizer, tokenize_doc: TextTokenizer) -> np.ndarray:
        queries = tokenize_query.lengths([self.titles[index] for index in self.usable])
        docs = tokenize_doc.lengths([self.texts[index] for index in self.usable])
        return np.array(queries) + np.array(docs) + round(self.count * sum(docs) / len(docs))
