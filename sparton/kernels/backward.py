"""The backward pass in Triton: each row of a gradient is summed by its owner, in one order, without atomics."""

from __future__ import annotations

import torch
from torch import Tensor

from sparton.kernels.backward_hidden import hidden_gradient
from sparton.kernels.backward_weight import weight_gradients


def triton_backward(
    grad: Tensor,
    factor: Tensor,
    positions: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    need: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Computes the gradients by hidden, weight and bias that are needed, each written once in its tensor's dtype.

    With ``g = grad * factor``, summed in float32 over the active entries (``factor > 0`` and ``grad != 0``) alone:
    ``d_weight[v] = sum_b g[b, v] * hidden[row(b, v)]``, ``d_hidden[r] = sum over row(b, v) == r of g[b, v] *
    weight[v]`` and ``d_bias[v] = sum_b g[b, v]``, where ``row(b, v) = cu_seqlens[b] + positions[b, v]``.
    The result is the same bit for bit from run to run, and nothing waits for the device. Beside the gradients it takes
    about ``configs.WORKSPACE`` + ``configs.TABLE`` bytes, or what one text takes where that is more; with hundreds of
    texts half a byte for each of the (B, V) entries (``configs.listed_words``).

    Args:
        grad: (B, V) of any floating dtype and any strides.
        factor: (B, V) float16 or float32 and positions: (B, V) integers, as the forward pass saved them.
        hidden: (N, D); weight: (V, D); bias: (V,) or None; of any floating dtype each.
        cu_seqlens: (B + 1,).
        max_seqlen: upper bound of the lengths.
        need: which of the three are wanted.

    Returns:
        (N, D), (V, D) and (V,), None for what is not wanted.
    """
    # A row is read with wide loads, so its columns must be neighbours; rows may stand anywhere.
    rows, words, grad = (tensor if tensor.stride(1) == 1 else tensor.contiguous() for tensor in (hidden, weight, grad))
    if grad.stride(0) >= 2**28:  # from text to text of a block in 32 bits
        grad = grad.contiguous()
    factor, positions, cu_seqlens = factor.contiguous(), positions.contiguous(), cu_seqlens.contiguous()
    make = torch.empty if factor.numel() and len(hidden) else torch.zeros
    d_hidden, d_weight, d_bias = (
        make(tensor.shape, dtype=tensor.dtype, device=tensor.device) if wanted else None
        for tensor, wanted in zip((hidden, weight, bias), need, strict=True)
    )
    if make is torch.empty:
        if need[1] or need[2]:
            weight_gradients(grad, factor, positions, rows, cu_seqlens, d_weight, d_bias)
        if need[0]:
            hidden_gradient(grad, factor, positions, words, cu_seqlens, max_seqlen, d_hidden)
    return d_hidden, d_weight, d_bias
