"""The head in five lines of PyTorch: the definition that everything else is tested against."""

from __future__ import annotations

import torch
from torch import Tensor


def lsr_head_reference(hidden: Tensor, weight: Tensor, bias: Tensor | None, lengths: list[int]) -> Tensor:
    """Computes ``max_s log1p(relu(hidden[b, s] . weight[v] + bias[v]))`` one sequence at a time.

    Args:
        hidden: (N, D) packed rows, any floating dtype; float64 for tests.
        weight: (V, D).
        bias: (V,) or None.
        lengths: rows of each sequence, in order; a sequence without rows gives zeros.

    Returns:
        (B, V) in the dtype of ``hidden``. Differentiable; a tie goes to the lowest position.
    """
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    parts = logits.relu().log1p().split(lengths)
    return torch.stack([p.max(0).values if len(p) else p.sum(0) for p in parts])
