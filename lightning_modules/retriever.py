"""The LightningModule: a training step of a sparse retriever, validation on a fixed pool, optimizer and schedule."""

from __future__ import annotations

from collections.abc import Mapping

import lightning as L
import scipy.sparse as sp
import torch
from torch import Tensor, nn
from transformers import get_scheduler

from datamodules.collate import TextBatch, TrainBatch
from lightning_modules.encoder import SparseEncoder
from retrieval.encode import to_csr
from retrieval.measure import measure, sparsity
from retrieval.search import ranked_run, search

SIDES = ("query", "doc")


class SparseRetriever(L.LightningModule):
    """Trains a :class:`SparseEncoder` with a ranking loss and a sparsity regulariser on each side.

    Queries and documents of a step go through the head in one call (one that pads takes each side apart), and through the
    backbone where it is packed.

    Args:
        encoder: backbone and head.
        loss: ranking losses with their weights (:class:`sparton.losses.WeightedSum`).
        query_regularizers, doc_regularizers: name to regulariser; each carries its own weight and warm-up.
        lr, weight_decay, betas, eps: AdamW (Loshchilov and Hutter 2019); norms and biases are not decayed.
        scheduler: a schedule of ``transformers.get_scheduler``: ``linear``, ``cosine`` or ``constant_with_warmup``.
        warmup: steps of the learning rate's linear warm-up (int), or their share of the run (float below 1).
    """

    def __init__(
        self,
        encoder: SparseEncoder,
        loss: nn.Module,
        *,
        query_regularizers: Mapping[str, nn.Module] | None = None,
        doc_regularizers: Mapping[str, nn.Module] | None = None,
        lr: float = 2e-5,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        scheduler: str = "linear",
        warmup: int | float = 0.1,
    ) -> None:
        super().__init__()
        if lr <= 0:
            raise ValueError(f"optimizer.lr must be positive, got {lr}: set optimizer.lr, for example 2e-5")
        if warmup < 0 or (isinstance(warmup, float) and warmup >= 1):
            raise ValueError(f"scheduler.warmup must be a step count or a share below 1.0 of the run, got {warmup}")
        self.encoder = encoder
        self.loss = loss
        self.regularizers = nn.ModuleDict(
            {"query": nn.ModuleDict(query_regularizers or {}), "doc": nn.ModuleDict(doc_regularizers or {})}
        )
        self.lr, self.weight_decay, self.betas, self.eps = lr, weight_decay, tuple(betas), eps
        self.scheduler_name, self.warmup = scheduler, warmup
        self.last_reps: tuple[Tensor, Tensor] | None = None
        self._pool: dict[str, list[sp.csr_matrix]] = {side: [] for side in SIDES}
        self.save_hyperparameters({"encoder": encoder.hparams()}, logger=False)

    def training_step(self, batch: TrainBatch, batch_idx: int) -> Tensor:
        query, doc = self.encoder(batch.query, batch.doc)
        parts = self.loss.parts(
            query, doc, teacher_scores=batch.teacher_scores, false_negatives=batch.false_negatives
        )
        total = self.loss.combine(parts)
        logs = {f"train/loss_{name}": value.detach() for name, value in parts.items()}
        steps = self.trainer.estimated_stepping_batches
        for side, rep in zip(SIDES, (query, doc), strict=True):
            for name, regularizer in self.regularizers[side].items():
                penalty, weight = regularizer(rep), regularizer.weight_at(self.global_step, steps)
                total = total + weight * penalty
                logs[f"train/reg_{name}_{side}"] = penalty.detach()
                logs[f"train/reg_{name}_{side}_weight"] = weight
        self.last_reps = (query.detach(), doc.detach())
        self.log("train/loss", total.detach(), prog_bar=True)
        self.log_dict(logs)
        self._log_sparsity()
        return total

    @torch.no_grad()
    def _log_sparsity(self) -> None:
        """Active dimensions of both sides and the FLOPS measure of this batch, without waiting for the device."""
        if self.global_step % self.trainer.log_every_n_steps:
            return
        for side, rep in zip(SIDES, self.last_reps, strict=True):
            self.log(f"train/active_dims_{side}", (rep > 0).sum(1).float().mean(), prog_bar=True)
            self.log(f"train/flops_{side}", rep.mean(0, dtype=torch.float32).square().sum())

    def on_train_batch_end(self, outputs: object, batch: TrainBatch, batch_idx: int) -> None:
        """Lets go of the representations once the callbacks have seen them, so that the next step's peak is its own."""
        self.last_reps = None

    def validation_step(self, batch: tuple[str, TextBatch], batch_idx: int) -> None:
        side, texts = batch
        self._pool[side].append(to_csr(self.encoder(texts)))

    def on_validation_epoch_end(self) -> None:
        """Searches the fixed pool and logs ``val_pool/*``; the sanity check's partial pool is dropped."""
        pieces, self._pool = self._pool, {side: [] for side in SIDES}
        if self.trainer.sanity_checking:
            return
        data = self.trainer.datamodule
        query, doc = (sp.vstack(pieces[side], format="csr") for side in SIDES)
        run = ranked_run(*search(query, doc, k=100), data.val_query_ids, data.val_doc_ids)
        figures = measure(data.val_qrels, run) | sparsity(query, doc)
        # Each process has searched the whole pool: their mean is each one's figure.
        self.log_dict({f"val_pool/{name}": value for name, value in figures.items()}, sync_dist=True)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips as Lightning does, which refuses a fused optimizer under any autocast although only fp16 scales."""
        if gradient_clip_val and self.trainer.precision == "bf16-mixed" and gradient_clip_algorithm in (None, "norm"):
            torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def configure_optimizers(self) -> dict:
        decayed = [p for p in self.parameters() if p.requires_grad and p.ndim >= 2]
        plain = [p for p in self.parameters() if p.requires_grad and p.ndim < 2]
        # Fused AdamW unscales inside its kernel, which Lightning's fp16 gradient clipping can't follow.
        fused = self.device.type == "cuda" and self.trainer.precision != "16-mixed"
        optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": self.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=self.lr, betas=self.betas, eps=self.eps, fused=fused,
        )
        steps = self.trainer.estimated_stepping_batches
        warmup = self.warmup if isinstance(self.warmup, int) else round(self.warmup * steps)
        schedule = get_scheduler(self.scheduler_name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
