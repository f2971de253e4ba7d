"""Tokens and samples per second, the time of a training step, and how long the warm-up took."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_modules.callbacks.clock import Mark, StepClock


class Throughput(StepClock):
    """Logs ``perf/step_ms``, ``perf/samples_per_sec``, ``perf/tokens_per_sec`` and the mean batch of this process.

    Steps, warm-up and reading are those of :class:`StepClock`. Tokens are the real ones, without padding: those pooled
    into the representations. They come from shapes that the host knows (``batch.query.pool_index.numel()``), not from
    ``cu_seqlens``, which lies on the device. A sample is a query with its documents, ``perf/batch_size`` of them a step
    on average, with ``perf/real_tokens_per_batch``, and ``perf/padded_tokens_per_batch`` where each side is padded to
    its longest text (a packed backbone doesn't compute those). A step is one batch also where gradients are accumulated
    over several.

    The warm-up, in which kernels compile, is left out of these and reported on its own, in the summary only:
    ``perf/first_step_s`` and ``perf/warmup_s``, from the start of the first batch. A head that counts its graphs
    (``compile_count``) adds ``perf/compiled_graphs``, of the warm-up, and ``perf/compiled_graphs_timed``, of the steps
    after it: where that is not 0, compiling is part of the rates.
    """

    def _restart(self) -> None:
        super()._restart()
        self._first: list[Mark] = []  # start of the first batch, its end, end of the warm-up
        self._graphs: list[int] = []  # compiled before training, until the end of the warm-up, until the end

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._count_graphs(pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if not self._first:
            self._first.append(self._last)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._batches == 1:
            self._first.append(self._last)
        if self._batches == self.warmup_steps:
            self._first.append(self._last)
            self._count_graphs(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if len(self._first) > 1:
            self._first[-1].synchronize()
        self._count_graphs(pl_module)

    def summary(self) -> dict[str, float]:
        """Returns the rates over all steps after the warm-up, and the warm-up itself, by metric name."""
        values = super().summary()
        for name, end in zip(("perf/first_step_s", "perf/warmup_s"), self._first[1:], strict=False):
            values[name] = self._first[0].elapsed_time(end) / 1e3
        if len(self._graphs) == 3:
            before, warm, after = self._graphs
            values |= {"perf/compiled_graphs": warm - before, "perf/compiled_graphs_timed": after - warm}
        return values

    def _count_graphs(self, pl_module: LightningModule) -> None:
        count = getattr(getattr(pl_module.encoder, "head", None), "compile_count", None)
        if count is not None:
            self._graphs.append(count)

    def _take(self, batch: Any) -> tuple[int, int, int]:
        real = batch.query.pool_index.numel() + batch.doc.pool_index.numel()
        return real, batch.query.input_ids.shape[0], batch.query.input_ids.numel() + batch.doc.input_ids.numel()

    def _add(self, start: Mark, end: Mark, taken: tuple[int, int, int]) -> tuple[float, ...]:
        return (start.elapsed_time(end), *taken)

    def _figures(self, steps: int, sums: tuple[float, ...]) -> dict[str, float]:
        milliseconds, tokens, samples, padded = sums
        seconds = max(milliseconds, 1e-6) / 1e3
        return {
            "perf/step_ms": milliseconds / steps,
            "perf/tokens_per_sec": tokens / seconds,
            "perf/samples_per_sec": samples / seconds,
            "perf/batch_size": samples / steps,
            "perf/real_tokens_per_batch": tokens / steps,
            "perf/padded_tokens_per_batch": padded / steps,
        }
