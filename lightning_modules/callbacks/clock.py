"""The clock of training steps that callbacks share: marks on the device's stream, read when it has passed them."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections import deque
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_modules.callbacks.checks import check_int


class HostMark:
    """A moment on the host's clock, with the interface of a `torch.cuda.Event` that was recorded."""

    def __init__(self) -> None:
        self._at = time.perf_counter()

    def query(self) -> bool:
        """Tells whether the moment has passed: always."""
        return True

    def synchronize(self) -> None:
        """Returns at once."""

    def elapsed_time(self, end: HostMark) -> float:
        """Returns the milliseconds from this mark to ``end``."""
        return (end._at - self._at) * 1e3


Mark = torch.cuda.Event | HostMark


def mark(device: torch.device) -> Mark:
    """Records a moment: on the device's stream on CUDA, on the host's clock elsewhere."""
    if device.type != "cuda":
        return HostMark()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


class StepClock(Callback):
    """Adds up figures of training steps and logs their means or rates.

    A step lasts from the end of the batch before to its own end, so that waiting for data counts; the first step
    after a validation or a checkpoint lasts from its own start, so that those don't. On CUDA the moments are events on
    the stream. They are read once the device has passed them, every ``log_every`` batches: nothing waits for the
    device before training ends.

    Args:
        warmup_steps: batches at the start (of a run or of a resumed run) that are left out.
        log_every: batches between two values in the log; each covers the steps since the one before.

    Raises:
        ValueError: for an argument that is not an int in its range.
    """

    def __init__(self, warmup_steps: int = 5, log_every: int = 10) -> None:
        name = type(self).__name__
        self.warmup_steps = check_int(name, "warmup_steps", warmup_steps, 0)
        self.log_every = check_int(name, "log_every", log_every, 1)
        self._restart()

    @abstractmethod
    def _take(self, batch: Any) -> Any:
        """What :meth:`_add` needs of the step that ends now besides its two ends; None where it isn't counted."""

    @abstractmethod
    def _add(self, start: Mark, end: Mark, taken: Any) -> tuple[float, ...]:
        """The figures of a step that the device has passed, which are added up."""

    @abstractmethod
    def _figures(self, steps: int, sums: tuple[float, ...]) -> dict[str, float]:
        """The values by metric name, of at least one step."""

    def _restart(self) -> None:
        self._batches = 0
        self._last: Mark | None = None
        self._pending: deque[tuple[Mark, Mark, Any]] = deque()
        self._window: tuple[float, ...] = ()
        self._total: tuple[float, ...] = ()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restart()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._last is None:
            self._last = mark(pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batches += 1
        start, self._last = self._last, mark(pl_module.device)
        taken = self._take(batch)
        if self._batches > self.warmup_steps and start is not None and taken is not None:
            self._pending.append((start, self._last, taken))
        if self._batches % self.log_every == 0:
            self._collect()
            if self._window:
                pl_module.log_dict(self._figures(int(self._window[0]), self._window[1:]))
                self._window = ()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._last = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._pending:
            self._pending[-1][1].synchronize()
            self._collect()

    def summary(self) -> dict[str, float]:
        """Returns the figures of all steps after the warm-up, by metric name; empty when there were none."""
        return self._figures(int(self._total[0]), self._total[1:]) if self._total else {}

    def _collect(self) -> None:
        """Adds up the steps that the device has finished."""
        while self._pending and self._pending[0][1].query():
            figures = (1, *self._add(*self._pending.popleft()))
            self._window = _plus(self._window, figures)
            self._total = _plus(self._total, figures)


def _plus(sums: tuple[float, ...], figures: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(a + b for a, b in zip(sums, figures, strict=True)) if sums else figures
