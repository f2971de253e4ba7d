"""Checkpoints: the best and the last, written whole or not at all, and one when Ctrl-C or SIGTERM comes."""

from __future__ import annotations

import os
import shutil
import signal
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_modules.callbacks.checks import check_int


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes beside the old file, on the same disk, and replaces it when the new one is complete.

    Lightning's own way goes through the temporary folder, from where a file may be *copied*: a full disk then leaves
    half a checkpoint under the final name.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str, storage_options: Any | None = None) -> None:
        """Writes one file.

        Raises:
            OSError: one line, where it could not be written; the old file stays and no part of the new one does.
        """
        target = Path(path)
        partial = target.with_name(target.name + ".partial")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, target)
        except (OSError, RuntimeError) as error:
            cause = _os_error(error)
            if cause is None:
                raise
            reason = cause.strerror or str(cause)
            raise OSError(
                f"checkpoint {target} could not be written ({reason}); earlier checkpoints in {target.parent} are whole:"
                " make room there and go on with ckpt_path="
            ) from error
        finally:
            partial.unlink(missing_ok=True)


class SafeCheckpoint(ModelCheckpoint):
    """Keeps ``best.ckpt`` by a validation metric and ``last.ckpt``, which is renewed while the run goes on.

    ``last.ckpt`` is written every ``save_every_steps`` optimizer steps, after each validation, at the end, and on
    Ctrl-C or SIGTERM. Both let the step in hand finish, so that the checkpoint is one to resume from exactly; a second
    Ctrl-C stops at once. Files load with ``torch.load(..., weights_only=True)``.

    Args:
        dirpath: folder of the two files.
        monitor, mode: the metric that decides what is best, and ``max`` or ``min``.
        save_every_steps: optimizer steps between two writes of ``last.ckpt``; 0 leaves it to validations and the end.
    """

    def __init__(
        self, dirpath: str, monitor: str = "val_pool/ndcg@10", mode: str = "max", save_every_steps: int = 100
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="best",
            monitor=monitor,
            mode=mode,
            save_top_k=1,
            auto_insert_metric_name=False,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
        self.save_every_steps = check_int("SafeCheckpoint", "save_every_steps", save_every_steps, 0)
        self._last_step = -1
        self._stop = False
        self._handler: Any = None

    @property
    def last_path(self) -> str:
        """``last.ckpt``."""
        return str(Path(self.dirpath) / "last.ckpt")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        with warnings.catch_warnings():
            # Going on in the folder of the run that is resumed is the normal case here.
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
            super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # a user's own plugin stays
            trainer.strategy.checkpoint_io = WholeCheckpointIO()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the best score along when a run goes on in another folder, with a copy of its checkpoint."""
        before, here = Path(state_dict["best_model_path"]), Path(self.dirpath) / "best.ckpt"
        if before != here and before.is_file():
            here.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(before, here)
        score, path, models, kth = state_dict["best_model_score"], str(here), {}, state_dict["kth_value"]
        if score is not None and here.is_file():
            models = {path: score}
        else:  # there is none, or it was deleted: what comes next is best
            score, path, kth = None, "", self.kth_value
        state = state_dict | {
            "dirpath": self.dirpath, "last_model_path": self.last_path, "best_model_score": score, "kth_value": kth,
            "best_model_path": path, "kth_best_model_path": path, "best_k_models": models,
        }  # fmt: skip
        super().load_state_dict(state)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._last_step, self._stop = trainer.global_step, False
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            try:
                self._handler = signal.signal(signal.SIGINT, self._on_signal)
            except ValueError:  # not the main thread: Ctrl-C goes elsewhere
                self._handler = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self._stop:
            raise KeyboardInterrupt
        if self.save_every_steps and step % self.save_every_steps == 0:
            self._save_last(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if self._stop:
            raise KeyboardInterrupt

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._last_step = -1  # the file gets the new score and the name of the best one
            self._save_last(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore_handler()
        self._save_last(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves on Ctrl-C and SIGTERM only: after an error the weights may be what caused it."""
        self._restore_handler()
        asked = isinstance(exception, (KeyboardInterrupt, SIGTERMException))
        if asked and trainer.state.fn == "fit" and trainer.global_step > 0:
            self._save_last(trainer)

    def _save_last(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run or trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        trainer.save_checkpoint(self.last_path)
        self.last_model_path = self.last_path

    def _on_signal(self, signum: int, frame: Any) -> None:
        if self._stop:
            raise KeyboardInterrupt
        self._stop = True

    def _restore_handler(self) -> None:
        if self._handler is not None:
            # Only what stands there by this callback: Lightning ignores the signal while it shuts down.
            if signal.getsignal(signal.SIGINT) == self._on_signal:
                signal.signal(signal.SIGINT, self._handler)
            self._handler = None


def load_best(module: LightningModule, trainer: Trainer) -> str | None:
    """Puts the weights of the best checkpoint (by the validation pool) into the module; None where there is none."""
    path = getattr(trainer.checkpoint_callback, "best_model_path", "")
    if not path:
        return None
    module.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["state_dict"])
    return path


def _os_error(error: BaseException | None) -> OSError | None:
    """The OSError behind an error: torch's writer raises a RuntimeError of its own when closing a file that failed."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
