"""The backward kernels: each row of a gradient is summed by its owner, in one order, without atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparton.kernels.configs import backward_block

# Entries that are sorted at once for dH; a sequence's rows belong to it alone, so ranges of sequences are independent.
SORT_ENTRIES = 2**28


@triton.jit
def weight_grad_kernel(
    g_ptr,
    positions_ptr,
    hidden_ptr,
    cu_seqlens_ptr,
    grad_ptr,
    B,
    V,
    D,
    stride_hn,
    BLOCK_D: tl.constexpr,
):
    """One program: BLOCK_D columns of the gradient of one word, ``sum_b g[b, v] * hidden[argmax row of (b, v)]``."""
    v = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    total = tl.zeros((BLOCK_D,), tl.float32)
    entry = v  # of a (B, V) matrix: counted up in int64, since b * V may pass 2^31
    for b in range(0, B):
        g = tl.load(g_ptr + entry)
        if g != 0.0:
            row = tl.load(cu_seqlens_ptr + b).to(tl.int64) + tl.load(positions_ptr + entry).to(tl.int64)
            total += g * tl.load(hidden_ptr + row * stride_hn + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        entry += V
    tl.store(grad_ptr + v * D + offs_d, total.to(grad_ptr.dtype.element_ty), mask=mask_d)


@triton.jit
def hidden_grad_kernel(
    g_ptr,
    order_ptr,
    starts_ptr,
    weight_ptr,
    grad_ptr,
    first_entry,
    V,
    D,
    stride_wv,
    BLOCK_D: tl.constexpr,
):
    """One program: BLOCK_D columns of the gradient of one token, over the words that it won, in ascending order."""
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    start = tl.load(starts_ptr + row)
    stop = tl.load(starts_ptr + row + 1)
    total = tl.load(grad_ptr + row * D + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    for place in range(start, stop):
        entry = tl.load(order_ptr + place).to(tl.int64)
        g = tl.load(g_ptr + first_entry + entry)
        word = entry % V
        total += g * tl.load(weight_ptr + word * stride_wv + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    tl.store(grad_ptr + row * D + offs_d, total.to(grad_ptr.dtype.element_ty), mask=mask_d)


def triton_backward(
    g: Tensor, positions: Tensor, hidden: Tensor, weight: Tensor, cu_seqlens: Tensor, need: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Launches the gradients; arguments and results as those of :func:`sparton.tiled.tiled_backward`."""
    hidden, weight = hidden.contiguous(), weight.contiguous()
    dim = weight.shape[1]
    block_d, num_warps = backward_block(dim)
    columns = triton.cdiv(dim, block_d)
    d_hidden = d_weight = None
    if need[1]:
        d_weight = torch.zeros_like(weight) if len(g) == 0 else torch.empty_like(weight)
        if len(g) and len(weight):
            weight_grad_kernel[(len(weight), columns)](
                g, positions, hidden, cu_seqlens, d_weight, len(g), len(weight), dim, hidden.stride(0),
                BLOCK_D=block_d, num_warps=num_warps,
            )
    if need[0]:
        d_hidden = _hidden_grad(g, positions, hidden, weight, cu_seqlens, block_d, num_warps)
    return d_hidden, d_weight


def _hidden_grad(
    g: Tensor, positions: Tensor, hidden: Tensor, weight: Tensor, cu_seqlens: Tensor, block_d: int, num_warps: int
) -> Tensor:
    """Sorts the active entries by their token row (stable: words stay in ascending order), then sums each row's."""
    (batch, vocab), tokens, dim = g.shape, len(hidden), hidden.shape[1]
    grad = torch.zeros_like(hidden)
    step = max(1, SORT_ENTRIES // max(vocab, 1))
    row_dtype = torch.int32 if tokens < 2**31 - 1 else torch.int64
    for first in range(0, batch if tokens and vocab else 0, step):
        part = slice(first, min(first + step, batch))
        rows = cu_seqlens[:-1][part, None].to(row_dtype) + positions[part].to(row_dtype)
        # Inactive entries sort behind the last token; how many there are is never asked.
        key, order = torch.where(g[part] != 0, rows, tokens).flatten().sort(stable=True)
        starts = torch.searchsorted(key, torch.arange(tokens + 1, dtype=row_dtype, device=g.device))
        hidden_grad_kernel[(tokens, triton.cdiv(dim, block_d))](
            g, order, starts, weight, grad, first * vocab, vocab, dim, weight.stride(0),
            BLOCK_D=block_d, num_warps=num_warps,
        )
    return grad
