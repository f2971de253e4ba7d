"""The next gradients by weight and bias, with SPARTON_PREVIEW=1: every word sums the rows that its texts' maxima name."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparton.kernels import configs


@triton.jit
def load_active(grad_ptr, factor_ptr, offs_grad, offs_out, mask):
    """Gradient by the maximal logit, float32, and where it isn't zero: a gradient of an inactive output has no effect."""
    factor = tl.load(factor_ptr + offs_out, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + offs_grad, mask=mask, other=0.0).to(tl.float32)
    active = (factor > 0.0) & (grad != 0.0)
    return tl.where(active, grad * factor, 0.0), active


@triton.jit(do_not_specialize=["B", "first_v", "last_v"])
def active_texts_kernel(
    grad_ptr,
    factor_ptr,
    texts_ptr,
    counts_ptr,
    bias_grad_ptr,
    B,
    V,
    first_v,
    last_v,
    stride_gb,
    stride_gv,
    LIST: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program: for BLOCK_V words, the texts in which they are active, in ascending order, and the gradient by bias."""
    offs_v = first_v + tl.program_id(0).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_v = offs_v < last_v
    count = tl.zeros((BLOCK_V,), tl.int32)
    total = tl.zeros((BLOCK_V,), tl.float32)
    for first in range(0, B, BLOCK_B):
        offs_b = first + tl.arange(0, BLOCK_B).to(tl.int64)
        mask = (offs_b < B)[:, None] & mask_v[None, :]
        offs_grad = offs_b[:, None] * stride_gb + offs_v[None, :] * stride_gv
        g, active = load_active(grad_ptr, factor_ptr, offs_grad, offs_b[:, None] * V + offs_v[None, :], mask)
        total += tl.sum(g, axis=0)
        if LIST:
            place = count[None, :] + tl.cumsum(active.to(tl.int32), axis=0) - 1
            target = texts_ptr + (offs_v - first_v)[None, :] * B + place
            text = (offs_b[:, None] + tl.zeros((1, BLOCK_V), tl.int64)).to(texts_ptr.dtype.element_ty)
            tl.store(target, text, mask=active)
            count += tl.sum(active.to(tl.int32), axis=0)
    if LIST:
        tl.store(counts_ptr + offs_v - first_v, count, mask=mask_v)
    if BIAS:
        tl.store(bias_grad_ptr + offs_v, total.to(bias_grad_ptr.dtype.element_ty), mask=mask_v)


@triton.jit(do_not_specialize=["B", "first_v"])
def weight_grad_kernel(
    grad_ptr,
    factor_ptr,
    positions_ptr,
    hidden_ptr,
    cu_seqlens_ptr,
    texts_ptr,
    counts_ptr,
    weight_grad_ptr,
    B,
    V,
    D,
    first_v,
    stride_gb,
    stride_gv,
    stride_hn,
    ENTRIES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: BLOCK_D columns of one word's gradient, ENTRIES texts at a time."""
    v = first_v + tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    texts_ptr += (v - first_v) * B
    count = tl.load(counts_ptr + v - first_v)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, count, ENTRIES):
        offs_e = first + tl.arange(0, ENTRIES)
        mask = offs_e < count
        text = tl.load(texts_ptr + offs_e, mask=mask, other=0).to(tl.int64)
        g, _ = load_active(grad_ptr, factor_ptr, text * stride_gb + v * stride_gv, text * V + v, mask)
        row = tl.load(cu_seqlens_ptr + text, mask=mask, other=0).to(tl.int64)
        row += tl.load(positions_ptr + text * V + v, mask=mask, other=0).to(tl.int64)
        total += weighted_sum(g, hidden_ptr, row, stride_hn, offs_d, mask, mask_d)
    tl.store(weight_grad_ptr + v * D + offs_d, total.to(weight_grad_ptr.dtype.element_ty), mask=mask_d)


@triton.jit
def weighted_sum(g, table_ptr, row, stride, offs_d, mask, mask_d):
    """``sum_e g[e] * table[row[e], offs_d]`` in float32; rows that are masked aren't read."""
    values = tl.load(
        table_ptr + row[:, None] * stride + offs_d[None, :], mask=mask[:, None] & mask_d[None, :], other=0.0
    )
    return tl.sum(g[:, None] * values.to(tl.float32), axis=0)


def word_gradients(
    grad: Tensor,
    factor: Tensor,
    positions: Tensor,
    hidden: Tensor,
    cu_seqlens: Tensor,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
) -> None:
    """Fills the gradients by weight (V, D) and bias (V,); None where not wanted.

    The list of a word's texts has room for all of them, an integer of the smallest size each; the vocabulary is taken in
    ranges whose lists fit ``configs.WORKSPACE``.
    """
    (batch, vocab), device = factor.shape, factor.device
    size = 1 if batch <= 2**8 else 2 if batch <= 2**15 else 4
    text_dtype = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[size]
    step = vocab if d_weight is None else max(1, min(vocab, configs.WORKSPACE // max(batch * size, 1)))
    texts = torch.empty(step * batch if d_weight is not None else 0, dtype=text_dtype, device=device)
    counts = torch.empty(step, dtype=torch.int32, device=device)
    strides = grad.stride()
    for first in range(0, vocab, step):
        words = min(step, vocab - first)
        active_texts_kernel[(triton.cdiv(words, 128),)](
            grad, factor, texts, counts, d_bias, batch, vocab, first, first + words, *strides,
            LIST=d_weight is not None, BIAS=d_bias is not None, BLOCK_B=32, BLOCK_V=128,
        )  # fmt: skip
        if d_weight is not None:
            dim = d_weight.shape[1]
            block_d, num_warps = configs.backward_block(dim)
            weight_grad_kernel[(words, triton.cdiv(dim, block_d))](
                grad, factor, positions, hidden, cu_seqlens, texts, counts, d_weight,
                batch, vocab, dim, first, *strides, hidden.stride(0),
                ENTRIES=configs.ENTRIES, BLOCK_D=block_d, num_warps=num_warps,
            )  # fmt: skip
