"""What every data module offers to training: the resumable loader, the validation pool, a line about itself."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Required, TypedDict, TypeVar

import numpy as np
import torch
from lightning import LightningDataModule

from datamodules.beir import Collection, Qrels
from datamodules.collate import TextBatch, TextTokenizer, TrainBatch
from datamodules.examples import Source
from datamodules.loader import Assembler, PlannedBatch, ResumableLoader
from datamodules.order import BatchPlan, EpochOrder
from datamodules.pool import Pool, PoolLoader

AnyBatch = TypeVar("AnyBatch", TrainBatch, tuple[str, TextBatch])


@dataclass(frozen=True)
class TrainingData:
    """Sources of examples, how many of each an epoch takes, and a few words about them."""

    sources: Sequence[Source]
    per_epoch: Sequence[int]
    description: str


class LoaderArguments(TypedDict, total=False):
    """The keywords of RetrievalDataModule, which every data module takes besides its own."""

    tokenize_query: Required[TextTokenizer]
    tokenize_doc: Required[TextTokenizer]
    seed: Required[int]
    batch_size: Required[int | None]
    batch_tokens: int | None
    num_workers: int | None
    val_pool: int
    max_val_queries: int
    eval_batch_size: int


class RetrievalDataModule(LightningDataModule, ABC):
    """Base of all data modules.

    A subclass says what there is to train on and what to validate on; both are loaded by ``setup("fit")``. The
    ``collection`` is read when it is first asked for, so that an evaluation needs no training split.

    Args:
        tokenize_query: makes the batches of queries.
        tokenize_doc: makes the batches of documents.
        seed: of the order of the examples and of the pool's random part, >= 0.
        batch_size: pairs in a training batch.
        batch_tokens: a budget of real tokens for a training batch; where it is given it replaces ``batch_size``.
        num_workers: worker processes that make training batches; None: up to 4 where training is on a GPU, which would
            wait for the tokenizer otherwise, and none on the CPU.
        val_pool: documents in the validation pool.
        max_val_queries: at most so many queries in it.
        eval_batch_size: texts in a validation batch.
    """

    def __init__(
        self,
        *,
        tokenize_query: TextTokenizer,
        tokenize_doc: TextTokenizer,
        seed: int,
        batch_size: int | None,
        batch_tokens: int | None = None,
        num_workers: int | None = None,
        val_pool: int = 1000,
        max_val_queries: int = 200,
        eval_batch_size: int = 64,
    ):
        super().__init__()
        for name, value in (("val_pool", val_pool), ("max_val_queries", max_val_queries)):
            if value < 1:
                raise ValueError(f"data.{name}: expected a number >= 1, got {value}; set data.{name}=200 or so")
        self.tokenize_query = tokenize_query
        self.tokenize_doc = tokenize_doc
        self.seed = seed
        self.batch_size = batch_size
        self.batch_tokens = batch_tokens
        self.num_workers = num_workers
        self.val_pool = val_pool
        self.max_val_queries = max_val_queries
        self.eval_batch_size = eval_batch_size
        self._training: TrainingData | None = None
        self._lengths: list[np.ndarray] | None = None
        self._plan: BatchPlan | None = None
        self._pool: Pool | None = None
        self._pool_loader: PoolLoader | None = None
        self._train_loader: ResumableLoader | None = None

    @abstractmethod
    def load_training(self) -> TrainingData:
        """Reads what to train on."""

    @abstractmethod
    def load_pool(self) -> Pool:
        """Makes what to validate on."""

    @abstractmethod
    def train_documents(self, n: int) -> list[str]:
        """The texts of ``n`` training documents (fewer if there are fewer), always the same ones."""

    @property
    def collection(self) -> Collection | None:
        """The collection that a test evaluates on, or None."""
        return None

    @property
    def test_split(self) -> str | None:
        """The split of ``collection`` to test on: test, else dev, else None."""
        qrels = self.collection.qrels if self.collection is not None else {}
        return next((split for split in ("test", "dev") if split in qrels), None)

    def setup(self, stage: str | None = None) -> None:
        """Loads training data and pool for fitting; nothing for other stages.

        Raises:
            FileNotFoundError, ValueError: whatever is wrong with the data, in one line.
        """
        if stage not in ("fit", "validate", None) or self._training is not None:
            return
        training = self.load_training()
        order = EpochOrder([len(source) for source in training.sources], training.per_epoch, self.seed)
        lengths = None if self.batch_tokens is None else self._measure(training)
        self._plan = BatchPlan(order, self.batch_size, self.batch_tokens, lengths)
        self._pool = self.load_pool()
        self._training = training

    def train_dataloader(self) -> ResumableLoader:
        """A new loader at the first batch; each process of a distributed run takes its own share."""
        self.setup("fit")
        if self._train_loader is not None:
            self._train_loader.close()
        self._train_loader = ResumableLoader(
            self._plan,
            self.make_assembler(self._training.sources),
            num_workers=self._num_workers(),
            rank=self.trainer.global_rank if self.trainer is not None else 0,
            world_size=self._world_size,
            pin_memory=torch.cuda.is_available(),
        )
        return self._train_loader

    @property
    def batch_unit(self) -> str:
        """What a batch is measured in: ``tokens`` where it has a budget of them, else ``size`` (pairs)."""
        return "size" if self.batch_tokens is None else "tokens"

    @property
    def batch_amount(self) -> int:
        """The size of a training batch, in its unit."""
        return self.batch_size if self.batch_tokens is None else self.batch_tokens

    @property
    def largest_batch(self) -> int:
        """The largest amount that leaves each process a batch in an epoch."""
        self.setup("fit")
        order = self._plan.order
        if self.batch_tokens is None:
            return max(1, len(order) // self._world_size)
        counted = zip(order.per_epoch, self._lengths, strict=True)
        expected = sum(count * lengths.mean() for count, lengths in counted if count)
        return max(1, int(expected) // self._world_size)

    def set_batch(self, amount: int) -> None:
        """Makes the training batches of the next loader so large, in their unit."""
        self._plan = self._resized(amount)
        self.batch_size, self.batch_tokens = self._plan.batch_size, self._plan.batch_tokens

    def costliest_batch(self, amount: int, *, padded: bool) -> TrainBatch:
        """The largest of an epoch's training batches, were they of this amount; the training order stays as it is.

        Args:
            amount: pairs or tokens, as ``batch_unit`` says.
            padded: whether a batch costs what its longest pair does, for each of its pairs, or its real tokens.
        """
        number, members = self._resized(amount).costliest(padded=padded)
        return self.make_assembler(self._training.sources)[PlannedBatch(0, number, members)]

    def _resized(self, amount: int) -> BatchPlan:
        self.setup("fit")
        size, tokens = (amount, None) if self.batch_tokens is None else (self.batch_size, amount)
        return BatchPlan(self._plan.order, size, tokens, self._measure(self._training))

    def _measure(self, training: TrainingData) -> list[np.ndarray]:
        """Tokens of each example, one array for each source."""
        if self._lengths is None:
            self._lengths = [source.lengths(self.tokenize_query, self.tokenize_doc) for source in training.sources]
        return self._lengths

    def _num_workers(self) -> int:
        if self.num_workers is not None:
            return self.num_workers
        if self.trainer is None or self.trainer.strategy.root_device.type == "cpu":
            return 0
        return max(0, min(4, (os.cpu_count() or 1) // self._world_size - 1))

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer is not None else 1

    def make_assembler(self, sources: Sequence[Source]) -> torch.utils.data.Dataset:
        """What turns a planned batch into a TrainBatch."""
        return Assembler(sources, self.tokenize_query, self.tokenize_doc, self.seed)

    def val_dataloader(self) -> PoolLoader:
        """("query" | "doc", TextBatch) over the pool: queries first, then documents, each from short to long."""
        self.setup("fit")
        if self._pool_loader is None:
            self._pool_loader = PoolLoader(self._pool, self.tokenize_query, self.tokenize_doc, self.eval_batch_size)
        return self._pool_loader

    @property
    def val_query_ids(self) -> list[str]:
        """Ids of the pool's queries in the order of ``val_dataloader``."""
        return self.val_dataloader().query_ids

    @property
    def val_doc_ids(self) -> list[str]:
        """Ids of the pool's documents in the order of ``val_dataloader``."""
        return self.val_dataloader().doc_ids

    @property
    def val_qrels(self) -> Qrels:
        """Judgements of the pool's queries."""
        self.setup("fit")
        return self._pool.qrels

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch of one process, before gradient accumulation."""
        self.setup("fit")
        return self._plan.batches_per_epoch // self._world_size

    def describe(self) -> str:
        """One line: what there is to train on, the size of an epoch and of the pool."""
        self.setup("fit")
        pool = self._pool
        return (
            f"{self._training.description}; {self.steps_per_epoch:,} batches an epoch; validation:"
            f" {len(pool.query_ids):,} queries in a pool of {len(pool.doc_ids):,} documents ({pool.description})"
        )

    def transfer_batch_to_device(self, batch: AnyBatch, device: torch.device, dataloader_idx: int) -> AnyBatch:
        """Copies a training batch or a (side, texts) pair; from page-locked memory without waiting."""
        if isinstance(batch, TrainBatch):
            return batch.to(device, non_blocking=True)
        side, texts = batch
        return side, texts.to(device, non_blocking=True)

    def teardown(self, stage: str) -> None:
        """Stops the worker processes after fitting."""
        if stage == "fit" and self._train_loader is not None:
            self._train_loader.close()
