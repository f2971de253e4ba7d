"""Penalties on sparse representations, each with a weight that warms up: FLOPS, L1, DF-FLOPS, anti-zero."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparton.losses.schedule import WarmupWeight


class _SumOverRanks(torch.autograd.Function):
    """All-reduced sum whose gradient is all-reduced too.

    With gradients averaged over ranks (DDP) this gives the gradient of the penalty of the global batch.
    """

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        total = local.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total


_sums_are_local = False  # a plain global: torch.compile guards on it, and can't trace a ContextVar


@contextmanager
def local_sums() -> Iterator[None]:
    """Inside, penalties are over the batch of their own process: no process waits for another one."""
    global _sums_are_local
    before, _sums_are_local = _sums_are_local, True
    try:
        yield
    finally:
        _sums_are_local = before


def _global_sum(local: Tensor) -> Tensor:
    """Sums a tensor over the processes of the run; without a process group it is returned as it is."""
    if _sums_are_local:
        return local
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return _SumOverRanks.apply(local)
    return local


def _sum_dtype(rep: Tensor) -> torch.dtype:
    """Sums are taken in float32, in float64 for float64."""
    return torch.float64 if rep.dtype == torch.float64 else torch.float32


def _mean_activation(rep: Tensor) -> Tensor:
    """Returns ``mean_b |rep[b, v]|`` over the global batch, ``(V,)``, in float32."""
    dtype = _sum_dtype(rep)
    total = rep.abs().sum(dim=0, dtype=dtype)
    # The number of rows travels with the sums: ranks may hold batches of different sizes.
    counted = _global_sum(torch.cat([total, total.new_full((1,), rep.shape[0])]))
    return counted[:-1] / counted[-1].detach()


class Regularizer(nn.Module):
    """A penalty on a batch of representations, and the weight it has at a step.

    Calling it gives the *raw* penalty; the training step multiplies it by ``weight_at(step, total_steps)``.

    Args:
        weight: full weight, >= 0.
        warmup: steps (int) or fraction of the run (float) over which the weight rises.
        shape: "quadratic" or "linear".
        threshold: texts with at most this many active dimensions are not regularised: their rows count as zeros, the
            mean still runs over all rows (the l0 mask of Shen et al., arXiv 2504.14839; the `threshold` of
            sentence-transformers' FlopsLoss). None regularises every text.

    Raises:
        ValueError: for a value outside of these.
    """

    def __init__(
        self, *, weight: float, warmup: int | float = 0, shape: str = "quadratic", threshold: int | None = None
    ) -> None:
        super().__init__()
        if threshold is not None and (isinstance(threshold, bool) or not isinstance(threshold, int) or threshold < 0):
            raise ValueError(
                f"threshold must be an int >= 0 of active dimensions or null, got {threshold!r}; use for example 64"
            )
        self.weight = WarmupWeight(weight, warmup, shape)
        self.threshold = threshold

    def weight_at(self, step: int, total_steps: int) -> float:
        """Returns the weight at a global step of a run of ``total_steps`` optimizer steps."""
        return self.weight.at(step, total_steps)

    def forward(self, rep: Tensor) -> Tensor:
        """Computes the raw penalty, without the weight.

        Args:
            rep: ``(B, V)``, fp32, fp64, bf16 or fp16; sums are taken in float32 (float64 for float64).

        Returns:
            A scalar, float32 (float64 for float64 input).

        Raises:
            ValueError: if ``rep`` is not a floating matrix with at least one row.
        """
        if rep.dim() != 2 or not rep.is_floating_point() or rep.shape[0] == 0:
            raise ValueError(
                f"{type(self).__name__}: rep must be a floating (B, V) matrix with B >= 1, "
                f"got {tuple(rep.shape)} of {rep.dtype}; pass the head's output"
            )
        # Sums below run in float32 by their own dtype arguments; autocast must not round what follows them.
        with torch.autocast(rep.device.type, enabled=False):
            return self.penalty(rep)

    def penalty(self, rep: Tensor) -> Tensor:
        """Computes the raw penalty of a checked ``(B, V)`` tensor; each regulariser defines its own."""
        raise TypeError("Regularizer: use one of its subclasses, got the base class; for example FLOPS")

    def _regularised(self, rep: Tensor) -> Tensor:
        """Zeroes the rows that the threshold exempts."""
        if self.threshold is None:
            return rep
        keep = torch.count_nonzero(rep, dim=1) > self.threshold
        return rep * keep.unsqueeze(1).to(rep.dtype)


class FLOPS(Regularizer):
    """``sum_v (mean_b |rep[b, v]|)^2`` over the global batch: Paria et al., arXiv 2004.05665.

    A smooth stand-in for the number of products per query-document pair. Under torch.distributed the mean runs over
    the batches of all processes, with gradients.
    """

    def penalty(self, rep: Tensor) -> Tensor:
        return _mean_activation(self._regularised(rep)).square().sum()


class L1(Regularizer):
    """``mean_b sum_v |rep[b, v]|``: the mean L1 norm of a text (Lassance and Clinchant, arXiv 2207.03834, for queries).

    The mean is linear in the texts, so that averaging gradients over processes needs no exchange here.
    """

    def penalty(self, rep: Tensor) -> Tensor:
        rep = self._regularised(rep)
        return rep.abs().sum(dtype=_sum_dtype(rep)) / rep.shape[0]


class DFFLOPS(Regularizer):
    """FLOPS that punishes words by how many texts use them: Porco et al., arXiv 2505.15070.

    ``sum_v (w[v] * mean_b |rep[b, v]|)^2`` with ``w[v] = 1 / (1 + (df[v] ** log_alpha(2) - 1) ** beta)``, where
    ``df[v]`` in [0, 1] is the share of texts in which v is active: w is 0 at df = 0, 1/2 at df = alpha, 1 at df = 1.

    The paper counts df every 100 steps on the validation documents. Here df is a running mean over the texts that
    training itself encodes (each call in training mode, over the global batch): plain over the first
    ``1 / (1 - momentum)`` batches, exponential from then on. It is kept in buffers, so that a resumed run continues
    exactly; no gradient flows through w.

    Args:
        alpha: the share of texts at which w is 1/2, in (0, 1).
        beta: steepness, above 0.
        momentum: of the running mean, in [0, 1).

    Raises:
        ValueError: for a value outside of these.
    """

    def __init__(
        self,
        *,
        weight: float,
        warmup: int | float = 0,
        shape: str = "quadratic",
        threshold: int | None = None,
        alpha: float = 0.1,
        beta: float = 10.0,
        momentum: float = 0.99,
    ) -> None:
        super().__init__(weight=weight, warmup=warmup, shape=shape, threshold=threshold)
        if not 0 < alpha < 1:
            raise ValueError(f"DFFLOPS: alpha must lie between 0 and 1, got {alpha!r}; use for example 0.1")
        if not 0 < beta < math.inf:
            raise ValueError(f"DFFLOPS: beta must be a finite number above 0, got {beta!r}; use for example 10")
        if not 0 <= momentum < 1:
            raise ValueError(f"DFFLOPS: momentum must lie in [0, 1), got {momentum!r}; use for example 0.99")
        self.alpha, self.beta, self.momentum = float(alpha), float(beta), float(momentum)
        self.register_buffer("document_frequency", torch.zeros(0))
        self.register_buffer("updates", torch.zeros((), dtype=torch.float32))

    def penalty(self, rep: Tensor) -> Tensor:
        if self.training:
            self._observe(rep.detach())
        if self.document_frequency.numel() != rep.shape[1]:
            raise ValueError(
                f"DFFLOPS: document frequencies must be known for V={rep.shape[1]} words, got "
                f"{self.document_frequency.numel()}; call it in training mode first, always with one vocabulary"
            )
        weighted = self.term_weights().to(_sum_dtype(rep)) * _mean_activation(self._regularised(rep))
        return weighted.square().sum()

    def term_weights(self) -> Tensor:
        """Returns ``w``, ``(V,)`` float32, from the document frequencies seen so far."""
        exponent = math.log(2.0) / math.log(self.alpha)
        return 1.0 / (1.0 + (self.document_frequency.pow(exponent) - 1.0).clamp(min=0.0).pow(self.beta))

    def _observe(self, rep: Tensor) -> None:
        """Updates the running document frequencies with a batch ``(B, V)``."""
        if self.document_frequency.numel() == 0:
            self.document_frequency = torch.zeros(rep.shape[1], device=rep.device)
            self.updates = self.updates.to(rep.device)
        if self.document_frequency.numel() != rep.shape[1]:
            return
        active = torch.count_nonzero(rep, dim=0).float()
        counted = _global_sum(torch.cat([active, active.new_full((1,), rep.shape[0])]))
        keep = (self.updates / (self.updates + 1.0)).clamp(max=self.momentum)
        # Not in place: an earlier call's graph may still hold the old tensor.
        self.document_frequency = self.document_frequency * keep + counted[:-1] / counted[-1] * (1.0 - keep)
        self.updates = self.updates + 1.0

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The size of the vocabulary is known from the first batch or from the checkpoint, whichever comes first.
        saved = state_dict.get(prefix + "document_frequency")
        if saved is not None and saved.shape != self.document_frequency.shape:
            self.document_frequency = self.document_frequency.new_zeros(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


class AntiZero(Regularizer):
    """``1 / (S^2 + 1e-6)`` with ``S = sum_{b, v} |rep[b, v]|`` over the global batch; keeps a side from dying out.

    The anti-zero term of the SPLADE training code (naver/splade, used for SPLADE-v3, arXiv 2403.06789), which is
    ``1 / S^2`` for each side; 1e-6 keeps it finite when every row is zero. It is negligible for a healthy side
    (1e-6 at S = 1000), and steep as the *whole side* goes to zero: single all-zero texts are what the callback
    CollapseAlarm reports. It takes no threshold: texts with few active dimensions are those it is for.

    Args:
        weight: full weight, >= 0.
        warmup: steps (int) or fraction of the run (float); a guard like this is usually on from the start.
        shape: "quadratic" or "linear".
    """

    def __init__(self, *, weight: float, warmup: int | float = 0, shape: str = "quadratic") -> None:
        super().__init__(weight=weight, warmup=warmup, shape=shape)

    def penalty(self, rep: Tensor) -> Tensor:
        total = _global_sum(rep.abs().sum(dtype=_sum_dtype(rep)))
        return 1.0 / (total.square() + 1e-6)
