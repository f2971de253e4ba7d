"""The gradients by weight and bias: every word lists the texts in which it is active and sums the rows they name."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparton.kernels import configs
from sparton.kernels.entries import add_rows, load_active, store_sums
from sparton.tiled import position_dtype


@triton.jit(do_not_specialize=["B", "first_v", "last_v", "stride_gb"])
def active_texts_kernel(
    grad_ptr,
    factor_ptr,
    texts_ptr,
    counts_ptr,
    grad_bias_ptr,
    B,
    V,
    first_v,
    last_v,
    stride_gb,
    stride_gv,
    HAS_LIST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program: for BLOCK_V words the texts in which they are active, ascending, and the gradient by bias."""
    offs_v = first_v + tl.program_id(0).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_v = offs_v < last_v
    count = tl.zeros((BLOCK_V,), tl.int32)
    total = tl.zeros((BLOCK_V,), tl.float32)
    for first_b in range(0, B, BLOCK_B):
        offs_b = first_b + tl.arange(0, BLOCK_B)
        row = offs_b.to(tl.int64)[:, None]
        mask = (offs_b < B)[:, None] & mask_v[None, :]
        g, active = load_active(
            grad_ptr, factor_ptr, row * stride_gb + offs_v[None, :] * stride_gv, row * V + offs_v[None, :], mask
        )
        total += tl.sum(g, axis=0)
        if HAS_LIST:
            one = active.to(tl.int32)
            place = count[None, :] + tl.cumsum(one, axis=0) - one
            text = tl.broadcast_to(offs_b[:, None], (BLOCK_B, BLOCK_V)).to(texts_ptr.dtype.element_ty)
            tl.store(texts_ptr + (offs_v - first_v)[None, :] * B + place, text, mask=active)
            count += tl.sum(one, axis=0)
    if HAS_LIST:
        tl.store(counts_ptr + offs_v - first_v, count, mask=mask_v)
    if HAS_BIAS:
        tl.store(grad_bias_ptr + offs_v, total.to(grad_bias_ptr.dtype.element_ty), mask=mask_v)


@triton.jit(do_not_specialize=["B", "first_v", "last_v", "stride_gb"])
def weight_grad_kernel(
    grad_ptr,
    factor_ptr,
    positions_ptr,
    hidden_ptr,
    cu_seqlens_ptr,
    texts_ptr,
    counts_ptr,
    grad_weight_ptr,
    B,
    V,
    first_v,
    last_v,
    stride_gb,
    stride_gv,
    stride_hn,
    D: tl.constexpr,
    WORDS: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """One program: the gradients of WORDS words one after the other, ENTRIES texts at a time; each is written once."""
    first = first_v + tl.program_id(0).to(tl.int64) * WORDS
    for word in range(0, tl.minimum(WORDS, last_v - first)):
        v = first + word
        list_ptr = texts_ptr + (v - first_v) * B
        count = tl.load(counts_ptr + v - first_v)
        total = tl.zeros((BLOCK_D,), tl.float32)
        rest = tl.zeros((BLOCK_REST,), tl.float32)
        for start in range(0, count, ENTRIES):
            offs_e = start + tl.arange(0, ENTRIES)
            mask = offs_e < count
            text = tl.load(list_ptr + offs_e, mask=mask, other=0).to(tl.int64)
            g, _ = load_active(grad_ptr, factor_ptr, text * stride_gb + v * stride_gv, text * V + v, mask)
            row = tl.load(cu_seqlens_ptr + text, mask=mask, other=0).to(tl.int64)
            row += tl.load(positions_ptr + text * V + v, mask=mask, other=0).to(tl.int64)
            total, rest = add_rows(total, rest, g, hidden_ptr, row * stride_hn, mask, D)
        store_sums(grad_weight_ptr + v * D, total, rest, D)


def weight_gradients(
    grad: Tensor,
    factor: Tensor,
    positions: Tensor,
    hidden: Tensor,
    cu_seqlens: Tensor,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
) -> None:
    """Fills the gradients by weight (V, D) and bias (V,), each where it is not None.

    A word's list has room for all texts, in the smallest integer that names them; the vocabulary is taken in ranges
    whose lists fit ``configs.WORKSPACE`` bytes.
    """
    (batch, vocab), device = factor.shape, factor.device
    has_list = d_weight is not None
    dtype = position_dtype(batch)
    step = min(vocab, max(1, configs.WORKSPACE // (batch * dtype.itemsize))) if has_list else vocab
    texts = torch.empty(step * batch if has_list else 0, dtype=dtype, device=device)
    counts = torch.empty(step if has_list else 0, dtype=torch.int32, device=device)
    for first in range(0, vocab, step):
        last = min(first + step, vocab)
        active_texts_kernel[(triton.cdiv(last - first, 128),)](
            grad, factor, texts, counts, d_bias, batch, vocab, first, last, *grad.stride(),
            HAS_LIST=has_list, HAS_BIAS=d_bias is not None, BLOCK_B=8, BLOCK_V=128, num_warps=4,
        )  # fmt: skip
        if has_list:
            dim = d_weight.shape[1]
            block_d, block_rest, columns = configs.gradient_columns(dim)
            weight_grad_kernel[(triton.cdiv(last - first, configs.WORDS), columns)](
                grad, factor, positions, hidden, cu_seqlens, texts, counts, d_weight,
                batch, vocab, first, last, *grad.stride(), hidden.stride(0),
                D=dim, WORDS=configs.WORDS, ENTRIES=configs.ENTRIES, BLOCK_D=block_d, BLOCK_REST=block_rest,
                num_warps=1,
            )  # fmt: skip
