"""Peak memory of training after a warm-up: of the device's allocator on CUDA, of the process on the CPU."""

from __future__ import annotations

import sys
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_modules.callbacks.checks import check_int

try:
    import resource
except ImportError:  # Windows has no such module: nothing is reported there.
    resource = None

MIB = 2**20


def peak_rss_mib() -> float:
    """Returns the largest resident set that this process ever had, in MiB."""
    # The kernel counts it in KiB on Linux, in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB


class PeakMemory(Callback):
    """Logs the peak memory since the warm-up.

    On CUDA ``perf/peak_mem_allocated_mib`` (bytes in live tensors) and ``perf/peak_mem_reserved_mib`` (bytes taken
    from the driver), both reset after ``warmup_steps`` batches, so that compiling and autotuning don't count;
    ``perf/alloc_retries``, how often since then the allocator had to give memory back before it could go on, which
    slows a step next to the limit. Reading them never waits for the device. On the CPU ``perf/peak_rss_mib``, the
    process's peak resident set, which no system lets one reset: it covers everything since the process began.

    Args:
        warmup_steps: training batches before the peaks are reset.
        log_every: batches between two values in the log.

    Raises:
        ValueError: for an argument that is not an int in its range.
    """

    def __init__(self, warmup_steps: int = 5, log_every: int = 10) -> None:
        self.warmup_steps = check_int("PeakMemory", "warmup_steps", warmup_steps, 0)
        self.log_every = check_int("PeakMemory", "log_every", log_every, 1)
        self._batches = 0
        self._retries = 0
        self._values: dict[str, float] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._batches, self._values = 0, {}
        if self.warmup_steps == 0:
            self._reset(pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batches += 1
        if self._batches == self.warmup_steps:
            self._reset(pl_module.device)
        elif self._batches > self.warmup_steps and self._batches % self.log_every == 0:
            self._values = self._read(pl_module.device)
            pl_module.log_dict(self._values)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._batches > self.warmup_steps:
            self._values = self._read(pl_module.device)

    def summary(self) -> dict[str, float]:
        """Returns the peaks read last, by metric name; empty when training ended within the warm-up."""
        return dict(self._values)

    def _reset(self, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._retries = _retries(device)

    def _read(self, device: torch.device) -> dict[str, float]:
        if device.type != "cuda":
            return {"perf/peak_rss_mib": peak_rss_mib()} if resource else {}
        return {
            "perf/peak_mem_allocated_mib": torch.cuda.max_memory_allocated(device) / MIB,
            "perf/peak_mem_reserved_mib": torch.cuda.max_memory_reserved(device) / MIB,
            "perf/alloc_retries": _retries(device) - self._retries,
        }


def _retries(device: torch.device) -> int:
    return torch.cuda.memory_stats(device).get("num_alloc_retries", 0)
