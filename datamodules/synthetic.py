"""Random token ids with lengths of a given distribution, for throughput and memory studies."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

import numpy as np
import torch
from torch.utils.data import Dataset

from datamodules.base import LoaderArguments, RetrievalDataModule, TrainingData
from datamodules.collate import TextBatch, TextTokenizer, TrainBatch
from datamodules.examples import Source
from datamodules.loader import PlannedBatch
from datamodules.pool import Pool


class LengthDistribution:
    """Lengths of texts in tokens, the same for the same index.

    Args:
        lengths: a list to draw from with equal chances; or
        mean, std: of a normal or log-normal distribution (std 0: every text has the mean).
        kind: "normal" or "lognormal".
        max_length: longer ones are cut to it, shorter ones than 1 are raised to 1.
    """

    def __init__(
        self,
        *,
        lengths: Sequence[int] | None,
        mean: float,
        std: float,
        kind: str,
        max_length: int,
    ):
        if kind not in ("normal", "lognormal"):
            raise ValueError(f"data.distribution: expected 'normal' or 'lognormal', got '{kind}'; set one of them")
        if mean <= 0 or std < 0:
            raise ValueError(f"data lengths: expected a mean > 0 and a std >= 0, got {mean} and {std}; correct them")
        if lengths is not None and (not len(lengths) or min(lengths) < 1):
            raise ValueError(f"data lengths: expected numbers >= 1, got {list(lengths)[:5]}; correct the list")
        self.lengths = None if lengths is None else list(lengths)
        self.mean = mean
        self.std = std
        self.kind = kind
        self.max_length = max_length

    def draw(self, rng: np.random.Generator, size: int) -> np.ndarray:
        """(size,) int64 lengths."""
        if self.lengths is not None:
            drawn = rng.choice(np.array(self.lengths), size)
        elif self.kind == "normal":
            drawn = rng.normal(self.mean, self.std, size)
        else:
            variance = np.log1p((self.std / self.mean) ** 2)
            drawn = rng.lognormal(np.log(self.mean) - variance / 2, np.sqrt(variance), size)
        return np.clip(np.rint(drawn), 1, self.max_length).astype(np.int64)


def read_lengths(path: str | Path) -> dict[str, list[int]]:
    """Lengths of queries and documents, one for each text, from a table that ``benchmarks.lengths`` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if its columns are others, or a side is missing.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"data.lengths: expected a table of lengths, got {file}, which is no file; correct it")
    sides: dict[str, list[int]] = {"query": [], "doc": []}
    with open(file, newline="", encoding="utf-8") as lines:
        for number, row in enumerate(csv.DictReader(lines), 2):
            try:
                sides[row["side"]] += [int(row["tokens"])] * int(row["texts"])
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"data.lengths: expected side (query or doc), tokens and texts in line {number} of {file}, "
                    f"got {row}; write it with python -m benchmarks.lengths"
                ) from error
    if not all(sides.values()):
        raise ValueError(f"data.lengths: expected lengths of queries and of documents, got {file} without; add them")
    return sides


class SyntheticExamples:
    """The lengths of a fixed number of examples; their tokens are made with the batch.

    Args:
        query_lengths: (n,) int64.
        doc_lengths: (n, K) int64.
    """

    def __init__(self, query_lengths: np.ndarray, doc_lengths: np.ndarray):
        self.query_lengths = query_lengths
        self.doc_lengths = doc_lengths

    def __len__(self) -> int:
        return len(self.query_lengths)

    def lengths(self, tokenize_query: TextTokenizer, tokenize_doc: TextTokenizer) -> np.ndarray:
        return self.query_lengths + self.doc_lengths.sum(axis=1)


class SyntheticAssembler(Dataset):
    """Makes a TrainBatch of random ids; nothing is tokenised.

    Args:
        source: the lengths.
        token_ids: (n,) int64, ids to draw from: the vocabulary without special tokens.
        padding_id: what texts are padded with.
        seed: ids depend on (seed, epoch, number of the batch).
    """

    def __init__(self, source: SyntheticExamples, token_ids: torch.Tensor, padding_id: int, seed: int):
        self.source = source
        self.token_ids = token_ids
        self.padding_id = padding_id
        self.seed = seed

    def __getitem__(self, planned: PlannedBatch) -> TrainBatch:
        members = [index for _, index in planned.members]
        entropy = np.random.SeedSequence([self.seed, planned.epoch, planned.number]).generate_state(1)
        generator = torch.Generator().manual_seed(int(entropy[0]))
        docs = self.source.doc_lengths[members]
        return TrainBatch(
            query=self.texts(self.source.query_lengths[members], generator),
            doc=self.texts(docs.reshape(-1), generator),
            false_negatives=torch.zeros(len(members), docs.size, dtype=torch.bool),
            teacher_scores=None,
        )

    def texts(self, lengths: np.ndarray, generator: torch.Generator) -> TextBatch:
        """Texts of the given lengths, every token pooled."""
        limits = torch.from_numpy(lengths)
        size = (len(limits), int(limits.max()))
        real = torch.arange(size[1]) < limits[:, None]
        ids = self.token_ids[torch.randint(len(self.token_ids), size, generator=generator)]
        return TextBatch.from_masks(torch.where(real, ids, self.padding_id), real.long(), real)


class SyntheticDataModule(RetrievalDataModule):
    """Random texts. The figures of a validation on them mean nothing; they only show that it runs.

    Args:
        size: examples in an epoch.
        negatives: documents besides the positive.
        distribution: "lognormal" (long tail, as real text) or "normal".
        query_mean, query_std: tokens of a query.
        doc_mean, doc_std: tokens of a document.
        query_lengths, doc_lengths: lists of lengths to draw from instead.
        lengths: a table of both instead (`read_lengths`), as data/lengths has them of real collections.
        loader: the keywords of RetrievalDataModule; the tokenizers' ``max_length`` cuts lengths.
    """

    def __init__(
        self,
        *,
        size: int = 100_000,
        negatives: int = 0,
        distribution: str = "lognormal",
        query_mean: float = 12.0,
        query_std: float = 6.0,
        doc_mean: float = 160.0,
        doc_std: float = 80.0,
        query_lengths: Sequence[int] | None = None,
        doc_lengths: Sequence[int] | None = None,
        lengths: str | Path | None = None,
        **loader: Unpack[LoaderArguments],
    ):
        super().__init__(**loader)
        if size < 1 or negatives < 0:
            raise ValueError(
                f"data.size, data.negatives: expected at least 1 and 0, got {size} and {negatives}; correct them"
            )
        if lengths is not None and (query_lengths or doc_lengths):
            raise ValueError("data.lengths: expected null beside data.query_lengths and data.doc_lengths; set one kind")
        if lengths is not None:
            query_lengths, doc_lengths = read_lengths(lengths).values()
        self.size = size
        self.negatives = negatives
        self._query_lengths = LengthDistribution(
            lengths=query_lengths,
            mean=query_mean,
            std=query_std,
            kind=distribution,
            max_length=self.tokenize_query.max_length,
        )
        self._doc_lengths = LengthDistribution(
            lengths=doc_lengths, mean=doc_mean, std=doc_std, kind=distribution, max_length=self.tokenize_doc.max_length
        )

    def load_training(self) -> TrainingData:
        """Draws the lengths of all examples."""
        rng = np.random.default_rng([self.seed, self.size])
        shape = (self.size, 1 + self.negatives)
        queries = self._query_lengths.draw(rng, self.size)
        docs = self._doc_lengths.draw(rng, shape[0] * shape[1]).reshape(shape)
        description = (
            f"synthetic: {self.size:,} examples, queries of {queries.mean():.1f} tokens on average (at most"
            f" {queries.max()}), {shape[1]} documents each of {docs.mean():.1f} (at most {docs.max()})"
        )
        return TrainingData([SyntheticExamples(queries, docs)], [self.size], description)

    def make_assembler(self, sources: Sequence[Source]) -> SyntheticAssembler:
        """Draws ids from the tokenizer's vocabulary without its special tokens."""
        tokenizer = self.tokenize_doc.tokenizer
        special = set(tokenizer.all_special_ids)
        ids = torch.tensor([token_id for token_id in range(len(tokenizer)) if token_id not in special])
        return SyntheticAssembler(sources[0], ids, tokenizer.pad_token_id, self.seed)

    def load_pool(self) -> Pool:
        """Random texts, each query with one of them as its relevant document."""
        docs = self.train_documents(self.val_pool)
        queries = self._random_texts(min(self.max_val_queries, len(docs)), self._query_lengths, 1)
        names = [str(number) for number in range(len(docs))]
        qrels = {name: {name: 1} for name in names[: len(queries)]}
        return Pool(list(qrels), queries, names, docs, qrels, "random texts")

    def train_documents(self, n: int) -> list[str]:
        """``n`` random texts in words of the vocabulary."""
        return self._random_texts(n, self._doc_lengths, 2)

    def _random_texts(self, n: int, distribution: LengthDistribution, stream: int) -> list[str]:
        tokenizer = self.tokenize_doc.tokenizer
        rng = np.random.default_rng([self.seed, stream])
        special = set(tokenizer.all_special_ids)
        ids = np.array([token_id for token_id in range(len(tokenizer)) if token_id not in special])
        return [tokenizer.decode(rng.choice(ids, length)) for length in distribution.draw(rng, n).tolist()]
