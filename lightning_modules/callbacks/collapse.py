"""Alarms for representations that collapse: all-zero texts, dead vocabulary, dimensions that every text has."""

from __future__ import annotations

import logging
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_modules.callbacks.checks import check_int

log = logging.getLogger(__name__)

SIDES = ("query", "doc")
ADVICE = {
    "zero_rows": "texts with an all-zero vector can't be found: lower the regulariser's weight, lengthen its warm-up "
    "or add anti_zero",
    "dead_vocab": "hardly any word is ever used: lower the regulariser's weight or lengthen its warm-up",
    "dims_in_every_text": "words that every text has tell nothing apart and make long posting lists: raise the "
    "regulariser's weight or take df_flops",
}


class CollapseAlarm(Callback):
    """Watches the representations of training batches and warns once per kind and side.

    Every ``every_n_steps`` batches it looks at ``pl_module.last_reps``, the detached pair ``(query (B, V),
    doc (B * K, V))``, and logs ``train/zero_rows_<side>``, the share of all-zero rows. A window of ``window`` such
    looks gives ``train/dead_vocab_<side>``, the share of words active in none of its texts, and
    ``train/dims_in_every_text_<side>``, the number of words active in all of them. One small copy to the host per look.

    Warnings go to the module's logger, at most once for each kind on each side, and only after ``warmup_steps``: an
    untrained model is often dense.

    Args:
        every_n_steps: batches between two looks.
        window: looks per window.
        warmup_steps: batches before the first warning (figures are logged from the start).
        max_zero_rows: share of all-zero rows above which a warning is due, in [0, 1].
        max_dead_vocab: share of dead words above which a warning is due, in [0, 1].

    Raises:
        ValueError: for an argument outside of its range.
    """

    def __init__(
        self,
        every_n_steps: int = 10,
        window: int = 10,
        warmup_steps: int = 100,
        max_zero_rows: float = 0.1,
        max_dead_vocab: float = 0.995,
    ) -> None:
        self.every_n_steps = check_int("CollapseAlarm", "every_n_steps", every_n_steps, 1)
        self.window = check_int("CollapseAlarm", "window", window, 1)
        self.warmup_steps = check_int("CollapseAlarm", "warmup_steps", warmup_steps, 0)
        for name, share in (("max_zero_rows", max_zero_rows), ("max_dead_vocab", max_dead_vocab)):
            if not 0 <= share <= 1:
                raise ValueError(f"CollapseAlarm: {name} must be a share in [0, 1], got {share!r}; use for example 0.1")
        self.limits = {"zero_rows": max_zero_rows, "dead_vocab": max_dead_vocab, "dims_in_every_text": 0}
        self._warned: set[str] = set()
        self._restart()

    def _restart(self) -> None:
        self._batches = self._looks = 0
        self._ever: dict[str, Tensor] = {}
        self._always: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restart()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batches += 1
        if self._batches % self.every_n_steps:
            return
        self._looks += 1
        window_ends = self._looks % self.window == 0
        figures: dict[str, Tensor] = {}
        for side, rep in zip(SIDES, pl_module.last_reps, strict=True):
            figures |= {f"{kind}_{side}": value for kind, value in self._look(side, rep, window_ends).items()}
        # One copy to the host for all figures.
        values = dict(zip(figures, torch.stack(list(figures.values())).tolist(), strict=True))
        pl_module.log_dict({f"train/{name}": value for name, value in values.items()})
        if trainer.global_step >= self.warmup_steps:
            self._warn(values, trainer.global_step)

    @torch.no_grad()
    def _look(self, side: str, rep: Tensor, window_ends: bool) -> dict[str, Tensor]:
        """Returns the figures of one side, and of its window where that ends here, as float32 scalars."""
        active = rep != 0
        figures = {"zero_rows": (~active.any(dim=1)).float().mean()}
        ever, always = active.any(dim=0), active.all(dim=0)
        if side in self._ever:
            ever, always = ever | self._ever[side], always & self._always[side]
        self._ever[side], self._always[side] = ever, always
        if window_ends:
            figures["dead_vocab"] = (~ever).float().mean()
            figures["dims_in_every_text"] = always.float().sum()
            del self._ever[side], self._always[side]
        return figures

    def _warn(self, values: dict[str, float], step: int) -> None:
        """Warns of each figure above its limit that was not warned of before."""
        for name, value in values.items():
            kind, side = name.rsplit("_", 1)
            if value > self.limits[kind] and name not in self._warned:
                self._warned.add(name)
                log.warning("step %d: %s of the %s side is %.4g; %s", step, kind, side, value, ADVICE[kind])
