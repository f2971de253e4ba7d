"""Training on rows of texts (query, positives, negatives, scores) from any file: checks, examples, held-out queries."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Protocol, Unpack

import numpy as np

from datamodules.base import LoaderArguments, RetrievalDataModule, TrainingData
from datamodules.beir import Collection, Qrels, load_collection
from datamodules.beir_module import split_train_dev
from datamodules.collate import TextTokenizer
from datamodules.examples import Example
from datamodules.pool import Pool, build_pool
from datamodules.splits import digest, held_out

CHUNK = 4096  # rows whose lengths are counted at a time


class Row(NamedTuple):
    """One row as it stands in the file; ``scores`` belong to the positives, then the negatives, or are None."""

    query: str
    positives: list[str]
    negatives: list[str]
    scores: list[float] | None = None


class Rows(Protocol):
    """Random access to the rows of a file or data set."""

    name: str

    def __len__(self) -> int: ...

    def row(self, index: int) -> Row:
        """Row ``index``.

        Raises:
            ValueError: if it is malformed, with its place.
        """

    def place(self, index: int) -> str:
        """Where row ``index`` stands, for error lines."""


@dataclass
class RowIndex:
    """What a pass over all rows found.

    Attributes:
        queries: digest of each row's query.
        relevant: digest of a query -> digests of its positives in all rows.
        fewest_negatives: negatives of the row that has the fewest.
        fewest_at: the place of that row.
        scored: whether the rows carry a teacher's scores.
    """

    queries: np.ndarray
    relevant: dict[int, set[int]] = field(default_factory=dict)
    fewest_negatives: int = 0
    fewest_at: str = ""
    scored: bool = False


def index_rows(rows: Rows) -> RowIndex:
    """Reads every row once and checks it.

    Raises:
        ValueError: for an empty text, a row without a positive, and scores in some rows only.
    """
    index = RowIndex(np.empty(len(rows), dtype=np.uint64))
    for number in range(len(rows)):
        row = rows.row(number)
        if not row.positives:
            raise ValueError(f"{rows.place(number)}: expected at least one positive, got none; remove the row")
        for text in (row.query, *row.positives, *row.negatives):
            if not text.strip():
                raise ValueError(f"{rows.place(number)}: expected texts, got an empty one; remove the row")
        if number == 0:
            index.scored = row.scores is not None
        elif index.scored != (row.scores is not None):
            found = "none" if index.scored else "some"
            raise ValueError(
                f"{rows.place(number)}: expected scores in every row or in none, got {found} unlike the rows before;"
                " make them alike"
            )
        if number == 0 or len(row.negatives) < index.fewest_negatives:
            index.fewest_negatives, index.fewest_at = len(row.negatives), rows.place(number)
        query = digest(row.query)
        index.queries[number] = query
        index.relevant.setdefault(query, set()).update(digest(text) for text in row.positives)
    return index


class RowExamples:
    """One example for every row: its query, one positive, and some of its negatives.

    A text is known by its digest, so that a positive of another row is masked where any row says that it is relevant.

    Args:
        rows: the rows.
        index: what ``index_rows`` found.
        chosen: the rows to train on.
        count: negatives in an example, drawn from the row's.
    """

    def __init__(self, rows: Rows, index: RowIndex, chosen: np.ndarray, count: int):
        self.rows = rows
        self.relevant = index.relevant
        self.chosen = chosen
        self.count = count

    def __len__(self) -> int:
        return len(self.chosen)

    def example(self, index: int, rng: random.Random) -> Example:
        row = self.rows.row(int(self.chosen[index]))
        positive = rng.randrange(len(row.positives)) if len(row.positives) > 1 else 0
        count = len(row.negatives)
        drawn = range(count) if self.count == count else sorted(rng.sample(range(count), self.count))
        docs = [row.positives[positive], *(row.negatives[k] for k in drawn)]
        scores = None
        if row.scores is not None:
            scores = [row.scores[positive], *(row.scores[len(row.positives) + k] for k in drawn)]
        relevant = frozenset(self.relevant[digest(row.query)])
        return Example(row.query, docs, [digest(doc) for doc in docs], relevant, scores)

    def lengths(self, tokenize_query: TextTokenizer, tokenize_doc: TextTokenizer) -> np.ndarray:
        """Of the first positive and the first negatives; those that are drawn differ a little."""
        result = np.empty(len(self), dtype=np.int64)
        for start in range(0, len(self), CHUNK):
            rows = [self.rows.row(int(number)) for number in self.chosen[start : start + CHUNK]]
            queries = tokenize_query.lengths([row.query for row in rows])
            docs = tokenize_doc.lengths([t for row in rows for t in (row.positives[0], *row.negatives[: self.count])])
            per_row = np.array(docs).reshape(len(rows), 1 + self.count).sum(axis=1)
            result[start : start + len(rows)] = np.array(queries) + per_row
        return result


class RowDataModule(RetrievalDataModule):
    """Base of the data modules that train on rows of texts.

    Validation uses ``eval_path``, a BEIR folder, where it is given: its dev split, or a tenth of its train queries.
    Otherwise every tenth query of the rows by a fixed hash of its text, at most ``max_val_queries`` of them, is held
    out, and searches among its own positives and negatives and those of other rows.

    Args:
        negatives: negatives in an example; None takes as many as every row has.
        eval_path: a BEIR folder to validate and test on.
        loader: the keywords of RetrievalDataModule.
    """

    def __init__(
        self,
        *,
        negatives: int | None = None,
        eval_path: str | None = None,
        **loader: Unpack[LoaderArguments],
    ):
        super().__init__(**loader)
        if negatives is not None and negatives < 0:
            raise ValueError(f"data.negatives: expected a number >= 0, got {negatives}; set data.negatives=0")
        self.negatives = negatives
        self.eval_path = eval_path

    @abstractmethod
    def open_rows(self) -> Rows:
        """Opens the rows."""

    @cached_property
    def collection(self) -> Collection | None:
        """The collection at ``eval_path``."""
        return None if self.eval_path is None else load_collection(self.eval_path)

    @cached_property
    def rows(self) -> Rows:
        """All rows, held-out ones included."""
        return self.open_rows()

    @cached_property
    def _index(self) -> RowIndex:
        return index_rows(self.rows)

    @cached_property
    def _held_out(self) -> np.ndarray:
        """(len(rows),) bool: rows whose query is kept for validation."""
        if self.eval_path is not None:
            return np.zeros(len(self.rows), dtype=bool)
        if len(self._index.relevant) < 2:
            raise ValueError(
                f"data.path: expected at least 2 different queries in {self.rows.name}, of which one is held out, got"
                f" {len(self._index.relevant)}; set data.eval_path to a BEIR folder"
            )
        chosen = held_out(self._index.relevant, self.max_val_queries)
        return np.isin(self._index.queries, np.array(sorted(chosen), dtype=np.uint64))

    def load_training(self) -> TrainingData:
        """One example for every row that is not held out."""
        index = self._index
        count = index.fewest_negatives if self.negatives is None else self.negatives
        if count > index.fewest_negatives:
            raise ValueError(
                f"data.negatives: expected at most {index.fewest_negatives}, which is what {index.fewest_at} has, got"
                f" {count}; lower data.negatives"
            )
        chosen = np.flatnonzero(~self._held_out)
        source = RowExamples(self.rows, index, chosen, count)
        teacher = "with" if index.scored else "without"
        description = (
            f"{self.rows.name}: {len(chosen):,} rows with {count} negatives {teacher} teacher scores,"
            f" {len(self.rows) - len(chosen):,} rows held out"
        )
        return TrainingData([source], [len(source)], description)

    def load_pool(self) -> Pool:
        """The pool of the collection at ``eval_path``, or of the held-out rows."""
        if self.collection is not None:
            dev = split_train_dev(self.collection).dev
            return build_pool(self.collection, dev, self.val_pool, self.max_val_queries, self.seed)
        return self._pool_of_rows()

    def _pool_of_rows(self) -> Pool:
        docs: dict[int, str] = {}
        queries: dict[int, str] = {}
        for number in np.flatnonzero(self._held_out).tolist():
            row = self.rows.row(number)
            queries[digest(row.query)] = row.query
            docs.update((digest(text), text) for text in row.positives)
        relevant = len(docs)
        order = np.random.default_rng([self.seed, len(self.rows)]).permutation(len(self.rows))
        own = [number for number in order if self._held_out[number]]
        for number in [*own, *(number for number in order if not self._held_out[number])]:
            if len(docs) >= self.val_pool:
                break
            row = self.rows.row(int(number))
            docs.update((digest(text), text) for text in (*row.negatives, *row.positives))
        kept = dict(list(docs.items())[: max(self.val_pool, relevant)])
        qrels: Qrels = {
            f"{query:016x}": {f"{doc:016x}": 1 for doc in sorted(self._index.relevant[query]) if doc in kept}
            for query in queries
        }
        return Pool(
            query_ids=list(qrels),
            queries=list(queries.values()),
            doc_ids=[f"{doc:016x}" for doc in kept],
            docs=list(kept.values()),
            qrels=qrels,
            description=f"{relevant:,} relevant, {len(kept) - relevant:,} negatives and texts of other rows",
        )

    def train_documents(self, n: int) -> list[str]:
        """The first positive of ``n`` training rows, drawn by a fixed seed."""
        chosen = np.flatnonzero(~self._held_out)
        order: Sequence[int] = np.random.default_rng(0).permutation(chosen)[:n].tolist()
        return [self.rows.row(number).positives[0] for number in order]
