"""Training on collections in the BEIR layout: judged pairs, title-to-abstract pairs, mixtures of collections."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple, Unpack

import numpy as np

from datamodules.base import LoaderArguments, RetrievalDataModule, TrainingData
from datamodules.beir import Collection, Qrels, load_collection, merge_collections, prefix_qrels
from datamodules.examples import ExampleSource, LabelledPairs, TitlePairs
from datamodules.groups import related_qrels, with_groups
from datamodules.pool import Pool, bm25_top, build_pool
from datamodules.splits import digest, held_out


class TrainDev(NamedTuple):
    """Judgements to train on and to choose by; ``derived`` says that dev was taken from the training queries."""

    train: Qrels
    dev: Qrels
    derived: bool


def split_train_dev(collection: Collection) -> TrainDev:
    """The train and dev judgements; without a dev file a fixed hash of the query id holds out 10% of the queries.

    Test judgements are never looked at.

    Raises:
        ValueError: if there is neither a train nor a dev split, or nothing is left to train or to choose by.
    """
    train, dev = collection.qrels.get("train"), collection.qrels.get("dev")
    if train is None and dev is None:
        found = ", ".join(sorted(collection.qrels)) or "none"
        raise ValueError(
            f"data.path: expected qrels/train.tsv or qrels/dev.tsv in {collection.name} to train on it, got splits:"
            f" {found}; evaluate.py works without them"
        )
    if dev is not None:
        return TrainDev(train or {}, dev, derived=False)
    if len(train) < 2:
        raise ValueError(
            f"data.path: expected at least 2 training queries in {collection.name}, of which one is held out, got"
            f" {len(train)}; add qrels/dev.tsv"
        )
    chosen = held_out(digest(query_id) for query_id in train)
    return TrainDev(
        train={query_id: grades for query_id, grades in train.items() if digest(query_id) not in chosen},
        dev={query_id: grades for query_id, grades in train.items() if digest(query_id) in chosen},
        derived=True,
    )


class BeirDataModule(RetrievalDataModule):
    """Pairs of a query and a relevant document, mixed with pairs of a document's title and its text.

    An epoch takes every judged pair once (of several collections: as many as there are together, shared out by
    ``weights``), and as many title pairs as ``title_pairs`` asks for beside them.

    Args:
        path: a BEIR folder, or a list of them whose corpora are joined (ids prefixed by the folder's name).
        weights: share of each collection among the pairs; None takes each by its number of judged pairs.
        title_pairs: share of every batch that is title-to-text pairs, from unlabelled corpus text; 1 uses no
            training judgement at all.
        negatives: documents besides the positive for every query, drawn from BM25's best ones that no judgement of
            the training split calls relevant (for title pairs: from all documents).
        negatives_depth: how many of BM25's documents negatives are drawn from.
        group_separator: stands between a group and its member in ids, such as the passage and the language of "p12/de";
            None: documents come alone.
        same_group: other members of a relevant document's group are ``relevant`` too (positives of training, and
            relevant in dev and test), or ``excluded`` (neither positives nor negatives of training, judged as the
            files judge them). Used with ``group_separator``.
        loader: the keywords of RetrievalDataModule.
    """

    def __init__(
        self,
        path: str | os.PathLike | Sequence[str | os.PathLike],
        *,
        weights: Sequence[float] | None = None,
        title_pairs: float = 0.0,
        negatives: int = 0,
        negatives_depth: int = 100,
        group_separator: str | None = None,
        same_group: str = "relevant",
        **loader: Unpack[LoaderArguments],
    ):
        super().__init__(**loader)
        self.paths = [str(path)] if isinstance(path, (str, os.PathLike)) else [str(one) for one in path]
        if not self.paths:
            raise ValueError("data.path: expected at least one folder, got an empty list; set data.path=<folder>")
        if not 0 <= title_pairs <= 1:
            raise ValueError(f"data.title_pairs: expected a share from 0 to 1, got {title_pairs}; set 0.5")
        if weights is not None and (len(weights) != len(self.paths) or min(weights) < 0 or sum(weights) <= 0):
            raise ValueError(
                f"data.weights: expected {len(self.paths)} numbers >= 0, one for each path, not all 0, got"
                f" {list(weights)}; correct data.weights"
            )
        if not 0 <= negatives <= negatives_depth:
            raise ValueError(
                f"data.negatives: expected a number from 0 to data.negatives_depth={negatives_depth}, got {negatives};"
                " lower data.negatives"
            )
        if title_pairs and group_separator is not None:
            raise ValueError(
                f"data.title_pairs: expected 0 with data.group_separator, got {title_pairs}: titles of one group would be"
                " negatives of each other; set data.title_pairs=0"
            )
        self.weights = None if weights is None else list(weights)
        self.title_pairs = title_pairs
        self.negatives = negatives
        self.negatives_depth = negatives_depth
        self.group_separator = group_separator
        self.same_group = same_group

    @cached_property
    def _parts(self) -> list[Collection]:
        return [with_groups(load_collection(path), self.group_separator, self.same_group) for path in self.paths]

    @cached_property
    def collection(self) -> Collection:
        """The collection, or all of them joined."""
        return self._parts[0] if len(self._parts) == 1 else merge_collections(self._parts)

    @cached_property
    def _splits(self) -> list[TrainDev]:
        splits = [split_train_dev(part) for part in self._parts]
        if len(self._parts) == 1:
            return splits
        # split by the ids as they are in the files: a collection has the same dev queries alone and in a mixture
        return [
            TrainDev(*(prefix_qrels(f"{part.name}/", qrels) for qrels in split[:2]), split.derived)
            for part, split in zip(self._parts, splits, strict=True)
        ]

    def train_documents(self, n: int) -> list[str]:
        """``n`` documents of the corpus, drawn by a fixed seed."""
        documents = self.collection.documents()
        order = np.random.default_rng(0).permutation(len(documents))[:n]
        return [documents[index] for index in order.tolist()]

    def load_training(self) -> TrainingData:
        """Judged pairs and title pairs of every collection, in their shares."""
        documents = self.collection.documents()
        if self.negatives >= len(documents):
            raise ValueError(
                f"data.negatives: expected fewer than the {len(documents)} documents, got {self.negatives};"
                " lower data.negatives"
            )
        labelled = [self._labelled_pairs(split.train, documents) for split in self._splits]
        weights = self.weights or [max(len(pairs), 1) for pairs in labelled]
        judged = sum(len(pairs) for pairs in labelled)
        sources: list[ExampleSource] = []
        per_epoch: list[int] = []
        if self.title_pairs < 1:
            self._check_judged(labelled, weights)
            sources.extend(labelled)
            per_epoch.extend(share_out(judged, weights))
        titled = 0
        if self.title_pairs > 0:
            titles = self._title_pairs()
            titled = sum(len(pairs) for pairs in titles)
            wanted = titled if self.title_pairs == 1 else round(judged * self.title_pairs / (1 - self.title_pairs))
            sources.extend(titles)
            per_epoch.extend(share_out(wanted, [w if len(t) else 0 for w, t in zip(weights, titles, strict=True)]))
        kept = [(source, count) for source, count in zip(sources, per_epoch, strict=True) if count]
        derived = " (10% of train by a hash of their id)" if any(split.derived for split in self._splits) else ""
        description = (
            f"{self.collection.name}: {len(documents):,} documents, {sum(len(s.train) for s in self._splits):,} train"
            f" queries with {judged:,} judged pairs, {titled:,} title-to-text pairs as {self.title_pairs:.0%} of each"
            f" batch, {self.negatives} negatives a query,"
            f" {sum(len(s.dev) for s in self._splits):,} dev queries{derived}"
        )
        return TrainingData([source for source, _ in kept], [count for _, count in kept], description)

    def load_pool(self) -> Pool:
        """The pool of all dev queries."""
        dev = {query_id: grades for split in self._splits for query_id, grades in split.dev.items()}
        return build_pool(self.collection, dev, self.val_pool, self.max_val_queries, self.seed)

    def _check_judged(self, labelled: Sequence[LabelledPairs], weights: Sequence[float]) -> None:
        for path, pairs, weight in zip(self.paths, labelled, weights, strict=True):
            if not len(pairs) and weight:
                raise ValueError(
                    f"data.path: expected qrels/train.tsv in {path} to train on its queries, got only a dev split;"
                    " set data.title_pairs=1 to train on titles alone"
                )

    def _title_pairs(self) -> list[TitlePairs]:
        """One source for each collection, numbered by positions in the joined corpus."""
        sources = []
        start = 0
        for part in self._parts:
            sources.append(TitlePairs(self.collection, range(start, start + len(part.doc_ids)), self.negatives))
            start += len(part.doc_ids)
        if not any(len(source) for source in sources):
            raise ValueError(
                f"data.title_pairs: expected documents with a title and a text, got none in {self.collection.name};"
                " set data.title_pairs=0"
            )
        return sources

    def _labelled_pairs(self, qrels: Qrels, documents: list[str]) -> LabelledPairs:
        related = qrels
        if self.group_separator is not None and self.same_group == "excluded":
            related = related_qrels(qrels, self.collection.doc_ids, self.group_separator)
        negatives = None
        if self.negatives and qrels:
            negatives = self._mine(related, documents)
        return LabelledPairs(self.collection, documents, qrels, negatives, self.negatives, related)

    def _mine(self, qrels: Qrels, documents: list[str]) -> dict[str, list[int]]:
        """BM25's best documents for each training query without the relevant ones, filled up at random if few."""
        position = {doc_id: index for index, doc_id in enumerate(self.collection.doc_ids)}
        ranked = bm25_top(documents, [self.collection.queries[query_id] for query_id in qrels], self.negatives_depth)
        mined: dict[str, list[int]] = {}
        for (query_id, grades), ranking in zip(qrels.items(), ranked, strict=True):
            relevant = {position[doc_id] for doc_id, grade in grades.items() if grade >= 1}
            found = [doc for doc in ranking if doc >= 0 and doc not in relevant]
            if len(found) < self.negatives:
                others = np.random.default_rng([self.seed, digest(query_id)]).permutation(len(documents)).tolist()
                taken = relevant.union(found)
                found.extend([doc for doc in others if doc not in taken][: self.negatives - len(found)])
            if len(found) < self.negatives:
                raise ValueError(
                    f"data.negatives: expected at most the {len(found)} documents that are not relevant to query"
                    f" '{query_id}', got {self.negatives}; lower data.negatives"
                )
            mined[query_id] = found
        return mined


def share_out(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to ``weights`` that add up to ``total`` (largest remainders first)."""
    exact = [total * weight / sum(weights) for weight in weights]
    shares = [int(value) for value in exact]
    by_remainder = sorted(range(len(weights)), key=lambda k: shares[k] - exact[k])
    for k in by_remainder[: total - sum(shares)]:
        shares[k] += 1
    return shares
