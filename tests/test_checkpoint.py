"""SafeCheckpoint: best and last, a full disk, resuming."""

from __future__ import annotations

import errno
import os
import resource
import signal
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_modules.callbacks import SafeCheckpoint
from lightning_modules.callbacks.checkpoint import WholeCheckpointIO
from lightning_modules.launch import _describe

SCORES = [0.2, 0.5, 0.3]


class Scored(BoringModel):
    """Logs a validation score that is best the second time."""

    def on_validation_epoch_end(self) -> None:
        self.log("val_pool/ndcg@10", SCORES[min(self.global_step // 2 - 1, 2)])


def trainer(folder: Path, callback: SafeCheckpoint, **settings: object) -> L.Trainer:
    defaults = {"max_steps": 6, "val_check_interval": 2, "limit_val_batches": 1, "num_sanity_val_steps": 0}
    return L.Trainer(
        **(defaults | settings), callbacks=[callback], default_root_dir=folder, logger=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def load(path: Path | str) -> dict:
    return torch.load(path, weights_only=True)


def test_keeps_the_best_and_the_last(tmp_path: Path) -> None:
    callback = SafeCheckpoint(str(tmp_path / "checkpoints"))
    trainer(tmp_path, callback).fit(Scored())
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["best.ckpt", "last.ckpt"]
    assert load(callback.best_model_path)["global_step"] == 4
    assert load(callback.last_path)["global_step"] == 6
    assert float(callback.best_model_score) == pytest.approx(0.5)


def test_saves_between_validations_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"limit_val_batches": 0, "limit_train_batches": 2}  # an epoch is two steps
    run = trainer(tmp_path, SafeCheckpoint(str(tmp_path), save_every_steps=3), max_steps=4, **settings)
    seen = []
    save = run.save_checkpoint
    monkeypatch.setattr(run, "save_checkpoint", lambda path: (seen.append(run.global_step), save(path)))
    run.fit(Scored())
    assert seen == [3, 4]
    again = trainer(tmp_path, SafeCheckpoint(str(tmp_path)), max_steps=6, **settings)
    again.fit(Scored(), ckpt_path=str(tmp_path / "last.ckpt"))
    assert load(tmp_path / "last.ckpt")["global_step"] == 6


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.ckpt"
    WholeCheckpointIO().save_checkpoint({"step": 1}, str(path))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="last.ckpt could not be written .No space left on device.*make room") as error:
        WholeCheckpointIO().save_checkpoint({"step": 2}, str(path))
    assert "\n" not in str(error.value)
    assert load(path) == {"step": 1} and os.listdir(tmp_path) == ["last.ckpt"]


def test_a_write_that_stops_half_way_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    WholeCheckpointIO().save_checkpoint({"step": 1}, str(path))
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="could not be written"):
            WholeCheckpointIO().save_checkpoint({"weights": torch.zeros(1_000_000)}, str(path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert load(path) == {"step": 1} and os.listdir(tmp_path) == ["last.ckpt"]


def test_an_error_in_training_saves_nothing_and_restores_the_signal(tmp_path: Path) -> None:
    class Broken(Scored):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            raise RuntimeError("broken")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError, match="broken"):
        trainer(tmp_path, SafeCheckpoint(str(tmp_path))).fit(Broken())
    assert os.listdir(tmp_path) == []
    assert signal.getsignal(signal.SIGINT) == before


def test_sigterm_in_a_launchers_worker_saves_the_last_step_and_is_said(tmp_path: Path) -> None:
    class Stopped(Scored):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            if self.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().training_step(batch, batch_idx)

    with pytest.raises(SIGTERMException) as stop:
        trainer(tmp_path, SafeCheckpoint(str(tmp_path / "checkpoints")), val_check_interval=5).fit(Stopped())
    assert load(tmp_path / "checkpoints/last.ckpt")["global_step"] == 3  # the step in hand was finished
    assert _describe(stop.value) == "stopped by SIGTERM"


@pytest.mark.parametrize("there", [True, False])
def test_the_best_score_goes_along_to_another_folder(tmp_path: Path, there: bool) -> None:
    first = SafeCheckpoint(str(tmp_path / "first"))
    trainer(tmp_path, first, max_steps=4, limit_train_batches=2).fit(Scored())
    if not there:
        Path(first.best_model_path).unlink()
    second = SafeCheckpoint(str(tmp_path / "second"))
    trainer(tmp_path, second, max_steps=6, limit_train_batches=2).fit(Scored(), ckpt_path=first.last_path)
    assert second.best_model_path == str(tmp_path / "second" / "best.ckpt")
    assert load(second.best_model_path)["global_step"] == (4 if there else 6)
    assert float(second.best_model_score) == pytest.approx(0.5 if there else 0.3)
