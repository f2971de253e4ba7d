"""Exact resume: random states and the training loader's position travel with every checkpoint."""

from __future__ import annotations

import random
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer

KEY = "resume_state"


@runtime_checkable
class Resumable(Protocol):
    """A loader that knows how far training has come (datamodules.loader.ResumableLoader)."""

    def confirm(self) -> None: ...

    def state_dict(self) -> dict[str, int]: ...

    def load_state_dict(self, state: dict[str, int]) -> None: ...


class ResumeState(Callback):
    """Makes a resumed run repeat what the uninterrupted one would have done, to the last bit on a CPU.

    Lightning restores weights, optimizer and its own counters. This adds the random states of python, numpy, torch and
    every CUDA device, one set for each process, and the position of the loader: the first batch after resuming is
    the one after the last that was trained. Everything is stored as tensors and plain numbers under the key
    ``resume_state``, so that ``torch.load(..., weights_only=True)`` reads it. Loggers that can (MetricsCSV) drop what
    they have from later steps than the checkpoint's: those are trained again.

    Gradients that have been accumulated but not yet applied are not part of a checkpoint. A resume is exact for
    checkpoints taken after an optimizer step, which ModelCheckpoint's ``every_n_train_steps`` guarantees; choose
    ``val_check_interval`` as a multiple of ``accumulate_grad_batches`` where validation triggers them.
    """

    def __init__(self) -> None:
        self._to_restore: dict[str, Any] | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the batch as consumed (before ModelCheckpoint, which Lightning always calls last)."""
        for loader in _loaders(trainer):
            loader.confirm()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the state to the checkpoint."""
        states: list[Any] = [get_random_states()]
        if trainer.world_size > 1:
            states = [None] * trainer.world_size
            torch.distributed.all_gather_object(states, get_random_states())
        loaders = [loader.state_dict() for loader in _loaders(trainer)]
        for loader in loaders:
            if loader["batches"] >= trainer.num_training_batches:  # an epoch cut short by limit_train_batches is over
                loader.update(epoch=loader["epoch"] + 1, batches=0)
        checkpoint[KEY] = {"random": states, "loaders": loaders}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keeps the state until training starts: the loader does not exist yet."""
        self._to_restore = checkpoint.get(KEY)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restores what ``on_load_checkpoint`` has kept and rewinds the loggers.

        Raises:
            ValueError: if the checkpoint was written with another number of loaders.
        """
        state, self._to_restore = self._to_restore, None
        if state is None:
            return
        for logger in trainer.loggers:
            if hasattr(logger, "rewind"):
                logger.rewind(trainer.global_step)
        loaders = _loaders(trainer)
        if len(loaders) != len(state["loaders"]):
            raise ValueError(
                f"ckpt_path: expected a checkpoint with {len(loaders)} resumable loaders, got {len(state['loaders'])};"
                " resume with the data that the run began with"
            )
        for loader, saved in zip(loaders, state["loaders"], strict=True):
            loader.load_state_dict(saved)
        # another number of processes: each keeps the state that seeding gave it
        if len(state["random"]) == trainer.world_size:
            set_random_states(state["random"][trainer.global_rank])


def get_random_states() -> dict[str, Any]:
    """Random states of this process as tensors and plain numbers."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": {"version": version, "internal": torch.tensor(internal, dtype=torch.int64), "gauss": gauss},
        "numpy": {
            "name": name,
            "keys": torch.from_numpy(keys.astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Restores what ``get_random_states`` returned; states of CUDA devices that are absent here are passed over."""
    python, numpy = states["python"], states["numpy"]
    random.setstate((python["version"], tuple(python["internal"].tolist()), python["gauss"]))
    keys = numpy["keys"].cpu().numpy().astype(np.uint32)
    np.random.set_state((numpy["name"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))
    torch.set_rng_state(states["torch"].cpu())
    if torch.cuda.is_available():
        for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state.cpu(), device)


def _loaders(trainer: Trainer) -> list[Resumable]:
    """The resumable ones among the training loaders."""
    loaders = trainer.train_dataloader
    loaders = loaders if isinstance(loaders, (list, tuple)) else [loaders]
    return [loader for loader in loaders if isinstance(loader, Resumable)]
