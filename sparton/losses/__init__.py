"""Ranking losses, sparsity regularisers and the schedule of a regulariser's weight."""

from sparton.losses.combine import WeightedSum
from sparton.losses.contrastive import InfoNCE
from sparton.losses.distillation import KLDistillation, MarginMSE
from sparton.losses.regularization import DFFLOPS, FLOPS, L1, AntiZero, Regularizer, local_sums
from sparton.losses.schedule import WarmupWeight

__all__ = [
    "DFFLOPS",
    "FLOPS",
    "L1",
    "AntiZero",
    "InfoNCE",
    "KLDistillation",
    "MarginMSE",
    "Regularizer",
    "WarmupWeight",
    "WeightedSum",
    "local_sums",
]
