"""Progress of training with loss and sparsity: a rich bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich.progress import BarColumn

from lightning_modules.callbacks.checks import check_int

# What is shown, under which name and in which format; short, to fit beside the bar in one line.
SHOWN = {
    "train/loss": ("loss", ".4f"),
    "train/active_dims_query": ("dims q", ".0f"),
    "train/active_dims_doc": ("dims d", ".0f"),
    "val_pool/ndcg@10": ("ndcg@10", ".4f"),
}
BAR_WIDTH = 12
# The class exists only inside Lightning's module, under a condition; its name is all there is to go by.
SPEED_COLUMN = "ProcessingSpeedColumn"


class SparsityProgressBar(RichProgressBar):
    """Shows the loss, the active dimensions of both sides and the last ``val_pool/ndcg@10``.

    Where stdout is no terminal (a file, a pipe, a CI log) the bar would flood it or show nothing: there it prints one
    plain line every ``plain_every`` batches and one after each validation. Values are read from the device every
    ``values_every`` batches only, since reading them waits for it.

    Args:
        refresh_rate: redraws of the bar per second on a terminal; 0 turns all output off.
        values_every: batches between two readings of the values on a terminal.
        plain_every: batches between two plain lines elsewhere.

    Raises:
        ValueError: for an argument that is not an int in its range.
    """

    def __init__(self, refresh_rate: int = 10, values_every: int = 10, plain_every: int = 50) -> None:
        super().__init__(refresh_rate=check_int("SparsityProgressBar", "refresh_rate", refresh_rate, 0))
        self.values_every = check_int("SparsityProgressBar", "values_every", values_every, 1)
        self.plain_every = check_int("SparsityProgressBar", "plain_every", plain_every, 1)
        self._plain = False
        self._values: dict[str, str] = {}
        self._batches = 0
        self._started = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.is_enabled and not sys.stdout.isatty():
            self._plain = True
            self.disable()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._batches, self._values, self._started = 0, {}, time.perf_counter()
        super().on_train_start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batches += 1
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._plain and (self._batches % self.plain_every == 0 or self._batches == 1):
            self._print_line(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if self._plain and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._print_line(trainer, note="validation")

    def configure_columns(self, trainer: Trainer) -> list:
        """Returns Lightning's columns without the speed (perf/step_ms has it) and with a short bar, for the values."""
        columns = [column for column in super().configure_columns(trainer) if type(column).__name__ != SPEED_COLUMN]
        for column in columns:
            if isinstance(column, BarColumn):
                column.bar_width = BAR_WIDTH
        return columns

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, str]:
        """Returns what is shown beside the bar, read anew every ``values_every`` batches and after a validation."""
        if not trainer.training or self._batches % self.values_every == 0 or not self._values:
            self._values = self._read(trainer)
        return self._values

    @staticmethod
    def _read(trainer: Trainer) -> dict[str, str]:
        metrics = trainer.callback_metrics
        return {label: f"{float(metrics[key]):{form}}" for key, (label, form) in SHOWN.items() if key in metrics}

    def _print_line(self, trainer: Trainer, note: str = "") -> None:
        values = "  ".join(f"{label} {value}" for label, value in self._read(trainer).items())
        total = trainer.estimated_stepping_batches
        seconds = time.perf_counter() - self._started
        print(f"step {trainer.global_step}/{total}  {values}  {seconds:.0f} s  {note}".rstrip(), flush=True)
