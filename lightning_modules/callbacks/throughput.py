"""Tokens and samples per second and the time of a training step, without waiting for the device at each step."""

from __future__ import annotations

import time
from collections import deque
from typing import Any, NamedTuple

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


class _Step(NamedTuple):
    start: Mark
    end: Mark
    tokens: int
    samples: int


def _mark(device: torch.device) -> Mark:
    """Records a moment: on the device's stream on CUDA, on the host's clock elsewhere."""
    if device.type != "cuda":
        return HostMark()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


class Throughput(Callback):
    """Logs ``perf/tokens_per_sec``, ``perf/samples_per_sec`` and ``perf/step_ms`` of this process.

    A step lasts from the end of the batch before to its own end, so that waiting for data counts; the first step
    after a validation or a checkpoint lasts from its own start, so that those don't. On CUDA the moments are events on
    the stream. They are read once the device has passed them, every ``log_every`` batches: nothing waits for the
    device before training ends.

    Tokens are the real ones, without padding: those pooled into the representations. They come from shapes that the
    host knows (``batch.query.pool_index.numel()``), not from ``cu_seqlens``, which lies on the device. A sample is a
    query with its documents. A step is one batch also where gradients are accumulated over several.

    Args:
        warmup_steps: batches at the start (of a run or of a resumed run) that are left out.
        log_every: batches between two values in the log; each covers the steps since the one before.

    Raises:
        ValueError: for an argument that is not an int in its range.
    """

    def __init__(self, warmup_steps: int = 5, log_every: int = 10) -> None:
        self.warmup_steps = check_int("Throughput", "warmup_steps", warmup_steps, 0)
        self.log_every = check_int("Throughput", "log_every", log_every, 1)
        self._restart()

    def _restart(self) -> None:
        self._batches = 0
        self._last: Mark | None = None
        self._pending: deque[_Step] = deque()
        self._window = self._total = (0, 0.0, 0, 0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restart()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._last is None:
            self._last = _mark(pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batches += 1
        start, self._last = self._last, _mark(pl_module.device)
        if self._batches > self.warmup_steps and start is not None:
            tokens = batch.query.pool_index.numel() + batch.doc.pool_index.numel()
            self._pending.append(_Step(start, self._last, tokens, batch.query.input_ids.shape[0]))
        if self._batches % self.log_every == 0:
            self._collect()
            if self._window[0]:
                pl_module.log_dict(self._rates(self._window))
                self._window = (0, 0.0, 0, 0)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._last = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._pending:
            self._pending[-1].end.synchronize()
            self._collect()

    def summary(self) -> dict[str, float]:
        """Returns the rates over all steps after the warm-up, by metric name; empty when there were none."""
        return self._rates(self._total) if self._total[0] else {}

    def _collect(self) -> None:
        """Adds up the steps that the device has finished."""
        while self._pending and self._pending[0].end.query():
            step = self._pending.popleft()
            taken = (1, step.start.elapsed_time(step.end), step.tokens, step.samples)
            self._window = tuple(a + b for a, b in zip(self._window, taken, strict=True))
            self._total = tuple(a + b for a, b in zip(self._total, taken, strict=True))

    @staticmethod
    def _rates(sums: tuple[int, float, int, int]) -> dict[str, float]:
        steps, milliseconds, tokens, samples = sums
        seconds = max(milliseconds, 1e-6) / 1e3
        return {
            "perf/step_ms": milliseconds / steps,
            "perf/tokens_per_sec": tokens / seconds,
            "perf/samples_per_sec": samples / seconds,
        }
