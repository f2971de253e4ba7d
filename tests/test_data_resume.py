"""A run resumed by Lightning from any checkpoint sees the batches, random numbers and weights of the whole run."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules.beir_module import BeirDataModule
from lightning_modules.callbacks.resume import ResumeState, get_random_states, set_random_states
from tests.data_helpers import loader_arguments, write_collection


class Toy(LightningModule):
    """A bag of words with dropout that notes what it sees at every step."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.EmbeddingBag(16_000, 4)
        self.dropout = torch.nn.Dropout(0.5)
        self.seen: list[tuple] = []

    def training_step(self, batch, batch_idx):
        scores = self.dropout(self.embedding(batch.query.input_ids)) @ self.embedding(batch.doc.input_ids).T
        loss = torch.nn.functional.cross_entropy(scores, torch.arange(len(scores)))
        draws = random.random(), float(np.random.rand()), float(torch.rand(()))
        self.seen.append((self.current_epoch, batch_idx, batch.doc.input_ids.sum().item(), loss.item(), *draws))
        return loss

    def validation_step(self, batch, batch_idx):
        side, texts = batch
        self.log(f"length_{side}", float(texts.max_seqlen), batch_size=1)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fit(
    folder: Path, out: Path, resume: Path | None = None, *, every: int = 1, workers: int = 0, **trainer_arguments
) -> Toy:
    seed_everything(5, verbose=False)
    model = Toy()
    keep = ModelCheckpoint(
        out, "{step}", every_n_train_steps=every, save_top_k=-1, save_on_train_epoch_end=False, save_last=True
    )
    at_end = ModelCheckpoint(out, "end-{epoch}", save_top_k=-1, save_on_train_epoch_end=True, every_n_epochs=1)
    at_val = ModelCheckpoint(
        out, "val-{step}", monitor="length_doc", save_top_k=-1, save_on_train_epoch_end=False, every_n_epochs=1
    )
    arguments = {"max_epochs": 3, "val_check_interval": 4, **trainer_arguments}
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[keep, at_end, at_val, ResumeState()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
        default_root_dir=out,
        **arguments,
    )
    data = BeirDataModule(folder, title_pairs=0.5, **loader_arguments(num_workers=workers, batch_size=6))
    trainer.fit(model, data, ckpt_path=resume, weights_only=True if resume else None)
    return model


@pytest.fixture
def folder(tmp_path):
    return write_collection(tmp_path / "small")


def check(folder: Path, tmp_path: Path, **arguments) -> list[str]:
    """Resumes from every checkpoint of a whole run; returns the differences."""
    whole = fit(folder, tmp_path / "whole", **arguments)
    problems = []
    for checkpoint in sorted((tmp_path / "whole").glob("*.ckpt")):
        progress = torch.load(checkpoint, weights_only=True)["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        done = progress["total"]["processed"]
        resumed = fit(folder, tmp_path / checkpoint.stem, checkpoint, **arguments)
        if resumed.seen != whole.seen[done:]:
            problems.append(f"{checkpoint.name} after {done}: {resumed.seen[:2]} instead of {whole.seen[done:][:2]}")
        if not all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True)):
            problems.append(f"{checkpoint.name}: other weights")
    return problems


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"workers": 2, "every": 5},
        {"accumulate_grad_batches": 2},
        {"max_epochs": -1, "max_steps": 20, "every": 3},
        {"limit_train_batches": 5, "every": 2},
    ],
    ids=["plain", "workers", "accumulate", "steps", "limit"],
)
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_resume_repeats_the_uninterrupted_run(folder, tmp_path, arguments):
    assert check(folder, tmp_path, **arguments) == []


def test_random_states_round_trip_through_weights_only(tmp_path):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    np.random.randn()  # leaves a cached normal number behind
    random.gauss(0, 1)
    torch.save(get_random_states(), tmp_path / "states.pt")

    def draw():
        return random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand(), torch.rand(3).tolist()

    expected = draw()
    random.seed(2), np.random.seed(2), torch.manual_seed(2)
    set_random_states(torch.load(tmp_path / "states.pt", weights_only=True))
    assert draw() == expected
