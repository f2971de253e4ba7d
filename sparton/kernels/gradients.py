"""The next backward pass, with SPARTON_PREVIEW=1: it has not run on a GPU yet."""

from __future__ import annotations

import torch
from torch import Tensor

from sparton.kernels.row_gradients import row_gradients
from sparton.kernels.word_gradients import word_gradients


def preview_backward(
    grad: Tensor,
    factor: Tensor,
    positions: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    need: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Computes the gradients by hidden, weight and bias that are needed, each written once in its tensor's dtype.

    Its cost falls with the entries that are active *and* have a gradient. It waits for nothing, is the same bit for bit
    from run to run, and takes ``configs.WORKSPACE`` bytes and (N, V / 4096) integers beside the gradients.

    Args:
        grad: (B, V), any strides; factor, positions: (B, V) as the forward pass saved them, contiguous.
        hidden: (N, D); weight: (V, D); bias: (V,) or None; cu_seqlens: (B + 1,).
        need: what is wanted of hidden, weight, bias.
    """
    hidden, weight, cu_seqlens = hidden.contiguous(), weight.contiguous(), cu_seqlens.contiguous()
    make = torch.empty if factor.numel() and len(hidden) else torch.zeros
    d_hidden, d_weight, d_bias = (
        make(tensor.shape, dtype=tensor.dtype, device=tensor.device) if wanted else None
        for tensor, wanted in zip((hidden, weight, bias), need, strict=True)
    )
    if make is torch.empty:
        if need[1] or need[2]:
            word_gradients(grad, factor, positions, hidden, cu_seqlens, d_weight, d_bias)
        if need[0]:
            row_gradients(grad, factor, positions, weight, cu_seqlens, d_hidden)
    return d_hidden, d_weight, d_bias
