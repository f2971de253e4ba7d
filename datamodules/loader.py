"""The training loader: batches in a fixed order that can be taken up again after any batch."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from datamodules.collate import TextTokenizer, TrainBatch
from datamodules.examples import ExampleSource, make_train_batch
from datamodules.order import BatchPlan

T = TypeVar("T")


class PlannedBatch(NamedTuple):
    """Where a batch stands in the order, and the (source, index) pairs that make it."""

    epoch: int
    number: int
    members: list[tuple[int, int]]


class Assembler(Dataset):
    """Turns a planned batch into a TrainBatch; this is what worker processes do.

    What examples draw at random depends on (seed, epoch, number of the batch) alone, not on the worker.

    Args:
        sources: the sources that the plan numbers.
        tokenize_query: for the queries.
        tokenize_doc: for the documents.
        seed: the run's seed.
    """

    def __init__(
        self,
        sources: Sequence[ExampleSource],
        tokenize_query: TextTokenizer,
        tokenize_doc: TextTokenizer,
        seed: int,
    ):
        self.sources = list(sources)
        self.tokenize_query = tokenize_query
        self.tokenize_doc = tokenize_doc
        self.seed = seed

    def __getitem__(self, planned: PlannedBatch) -> TrainBatch:
        rng = random.Random(f"{self.seed}/{planned.epoch}/{planned.number}")
        examples = [self.sources[source].example(index, rng) for source, index in planned.members]
        return make_train_batch(examples, self.tokenize_query, self.tokenize_doc)


class PlannedBatches(Sampler):
    """All batches from one position on, epoch after epoch without end, so that workers never wait between epochs.

    Args:
        plan: the order.
        epoch: the first epoch.
        number: the first batch in it, counted on this rank.
        length: batches of this rank in an epoch.
        rank: of this process.
        world_size: number of processes; rank r takes batches r, r + world_size, ... of the plan.
    """

    def __init__(self, plan: BatchPlan, epoch: int, number: int, length: int, rank: int, world_size: int):
        self.plan = plan
        self.position = (epoch, number)
        self.length = length
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[PlannedBatch]:
        epoch, number = self.position
        while True:
            start = number * self.world_size + self.rank
            batches = self.plan.batches(epoch, start, self.world_size)
            for count, members in zip(range(number, self.length), batches, strict=False):
                yield PlannedBatch(epoch, count * self.world_size + self.rank, members)
            epoch, number = epoch + 1, 0


class ResumableLoader:
    """Iterates over one epoch after another and knows how far *training* has come.

    Each ``iter()`` runs through the next epoch; the first one after ``load_state_dict`` goes on where the state was
    taken. ``state_dict`` counts batches that training is done with, which is neither what workers have prepared nor
    what has been handed out: a batch counts once ``confirm()`` was called for it (the ResumeState callback does, at the
    end of each training step) or the next one is asked for.

    Args:
        plan: the order of the batches.
        assembler: what makes a batch of a planned one.
        num_workers: worker processes; 0 makes batches in this process.
        rank: of this process among those that train.
        world_size: number of processes that train.
        pin_memory: put batches into page-locked memory, for copies to a GPU.
    """

    def __init__(
        self,
        plan: BatchPlan,
        assembler: Dataset,
        *,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
    ):
        if num_workers < 0:
            raise ValueError(f"data.num_workers: expected a number >= 0, got {num_workers}; set data.num_workers=0")
        if plan.batches_per_epoch < world_size:
            raise ValueError(
                f"batch.size: expected at least one batch for each of {world_size} processes, got"
                f" {plan.batches_per_epoch} in an epoch; make the batches smaller"
            )
        self.plan = plan
        self.assembler = assembler
        self.num_workers = num_workers
        self.rank = rank
        self.world_size = world_size
        self.pin_memory = pin_memory
        self._length = plan.batches_per_epoch // world_size
        self._epoch = 0
        self._consumed = 0
        self._handed_out = 0
        self._begun = False
        self._stream: Iterator[TrainBatch] | None = None
        self._stream_position = (0, 0)

    def __len__(self) -> int:
        """Batches in an epoch, the same in every epoch."""
        return self._length

    def __iter__(self) -> Iterator[TrainBatch]:
        # a generator: nothing starts before the first batch is asked for, so a state loaded meanwhile still counts
        if self._begun:
            self._epoch, self._consumed = self._epoch + 1, 0
        self._begun = True
        self._handed_out = self._consumed
        for number in range(self._consumed, self._length):
            batch = self._fetch(self._epoch, number)
            self._handed_out = number + 1
            yield batch
            self.confirm()

    def confirm(self) -> None:
        """Counts what has been handed out as consumed."""
        self._consumed = self._handed_out

    def state_dict(self) -> dict[str, int]:
        """The position in plain numbers: ``epoch`` and ``batches`` consumed of it, and ``length`` to compare."""
        return {"epoch": self._epoch, "batches": self._consumed, "length": self._length}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Makes the next ``iter()`` start at ``state``.

        Raises:
            ValueError: if the state stands within an epoch of another length, for then it means another order.
        """
        epoch, batches = state["epoch"], state["batches"]
        if batches and state["length"] != self._length:
            raise ValueError(
                f"ckpt_path: expected a checkpoint of epochs of {self._length} batches, got one of {state['length']};"
                " resume with the same data, batch and number of processes"
            )
        self._epoch, self._consumed = (epoch, batches) if batches < self._length else (epoch + 1, 0)
        self._handed_out = self._consumed
        self._begun = False

    def close(self) -> None:
        """Stops the worker processes; a later ``iter()`` starts new ones."""
        self._stream = None

    def _fetch(self, epoch: int, number: int) -> TrainBatch:
        if self._stream is None or self._stream_position != (epoch, number):
            self._stream = self._start_stream(epoch, number)
        batch = next(self._stream)
        self._stream_position = (epoch, number + 1) if number + 1 < self._length else (epoch + 1, 0)
        return batch

    def _start_stream(self, epoch: int, number: int) -> Iterator[TrainBatch]:
        self.close()
        loader = DataLoader(
            self.assembler,
            batch_size=None,
            sampler=PlannedBatches(self.plan, epoch, number, self._length, self.rank, self.world_size),
            num_workers=self.num_workers,
            collate_fn=as_is,
            pin_memory=self.pin_memory,
            generator=torch.Generator(),  # the seed of the workers must not be drawn from the run's own random state
        )
        with single_threaded_tokenizers(self.num_workers > 0):
            return iter(loader)


def as_is(batch: T) -> T:
    """Returns its argument: batches leave the dataset ready made."""
    return batch


@contextmanager
def single_threaded_tokenizers(active: bool) -> Iterator[None]:
    """Lets processes that are forked inside tokenize in one thread each; this process keeps its setting.

    Tokenizers that have run in threads print a warning when the process forks, unless the variable is set.
    """
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    if active and before is None:
        os.environ[name] = "false"
    try:
        yield
    finally:
        if active and before is None:
            del os.environ[name]
