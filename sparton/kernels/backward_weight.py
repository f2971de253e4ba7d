"""The gradients by weight and bias: every word lists the texts in which it is active and sums the rows they name."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparton.kernels import configs
from sparton.kernels.entries import activity, in_pairs, load_pair, make_entry, store_columns, sum_rows


@triton.jit(do_not_specialize=["B", "first_v", "last_v", "stride_gb"])
def list_texts_kernel(
    grad_ptr,
    factor_ptr,
    positions_ptr,
    cu_seqlens_ptr,
    list_ptr,
    counts_ptr,
    grad_bias_ptr,
    B,
    V,
    first_v,
    last_v,
    stride_gb,
    HAS_LIST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program: for BLOCK_V words the rows that won them, text by text, and the gradient by bias.

    The lists of neighbouring words stand beside each other, the first entries of all, then the second ones, and so on:
    the threads of a warp write, and those of a multiprocessor read, what lies together.
    """
    begin = tl.program_id(0) * BLOCK_V
    offs_v = tl.arange(0, BLOCK_V)
    words = last_v - first_v
    mask_v = begin + offs_v < words
    # Offsets within a tile fit 32 bits; where it is does not.
    first_v = first_v.to(tl.int64) + begin
    grad_ptr += first_v
    factor_ptr += first_v
    positions_ptr += first_v
    list_ptr += begin
    text = tl.arange(0, BLOCK_B)
    offs_grad = text[None, :] * stride_gb + offs_v[:, None]
    offs_out = text[None, :] * V + offs_v[:, None]
    count = tl.zeros((BLOCK_V,), tl.int32)
    total = tl.zeros((BLOCK_V,), tl.float32)
    # The next texts' are loaded while these are listed.
    mask = mask_v[:, None] & (text < B)[None, :]
    grad = tl.load(grad_ptr + offs_grad, mask=mask, other=0.0)
    factor = tl.load(factor_ptr + offs_out, mask=mask, other=0.0)
    for first_b in range(0, B, BLOCK_B):
        grad_ptr += BLOCK_B * stride_gb
        factor_ptr += BLOCK_B * V
        mask = mask_v[:, None] & (first_b + BLOCK_B + text < B)[None, :]
        next_grad = tl.load(grad_ptr + offs_grad, mask=mask, other=0.0)
        next_factor = tl.load(factor_ptr + offs_out, mask=mask, other=0.0)
        g, active = activity(grad, factor)
        total += tl.sum(g, axis=1)
        one = active.to(tl.int32)
        if HAS_LIST and tl.max(tl.max(one, axis=1), axis=0) > 0:
            row = tl.load(cu_seqlens_ptr + first_b + text, mask=first_b + text < B, other=0)[None, :]
            row += tl.load(positions_ptr + offs_out, mask=active, other=0)
            place = count[:, None] + tl.cumsum(one, axis=1) - one
            tl.store(list_ptr + place * words + offs_v[:, None], make_entry(g, row), mask=active)
            count += tl.sum(one, axis=1)
        positions_ptr += BLOCK_B * V
        grad = next_grad
        factor = next_factor
    if HAS_LIST:
        tl.store(counts_ptr + begin + offs_v, count, mask=mask_v)
    if HAS_BIAS:
        tl.store(grad_bias_ptr + first_v + offs_v, total.to(grad_bias_ptr.dtype.element_ty), mask=mask_v)


@triton.jit(do_not_specialize=["first_v", "last_v"])
def weight_grad_kernel(
    hidden_ptr,
    list_ptr,
    counts_ptr,
    grad_weight_ptr,
    first_v,
    last_v,
    STRIDE: tl.constexpr,
    D: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """One program: BLOCK_D columns of the gradients of WORDS words one after the other, each written once.

    Counts are loaded two words ahead and a word's first entries one word ahead: most words have few.
    """
    column = tl.program_id(1) if D > BLOCK_D else 0
    words = last_v - first_v
    first = tl.program_id(0).to(tl.int64) * WORDS
    last = tl.minimum(first + WORDS, words)
    list_ptr += first
    count = tl.load(counts_ptr + first)
    next_count = tl.load(counts_ptr + first + 1, mask=first + 1 < last, other=0)
    pair = load_pair(list_ptr, words, 0, count)
    for word in range(first, last):
        later_count = tl.load(counts_ptr + word + 2, mask=word + 2 < last, other=0)
        next_pair = load_pair(list_ptr + 1, words, 0, next_count)
        total = sum_rows(pair, list_ptr, words, 0, count, hidden_ptr, column, STRIDE, D, BLOCK_D, PAIRS)
        store_columns(grad_weight_ptr + (first_v + word) * D, total, column, D, BLOCK_D)
        list_ptr += 1
        pair = next_pair
        count = next_count
        next_count = later_count


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

    A word's list has room for all texts; the vocabulary is taken in ranges of ``configs.listed_words``.
    """
    (batch, vocab), device = factor.shape, factor.device
    has_list = d_weight is not None
    step = configs.listed_words(vocab, batch) if has_list else vocab
    entries = torch.empty(step * batch if has_list else 0, dtype=torch.int64, device=device)
    counts = torch.empty(step if has_list else 0, dtype=torch.int32, device=device)
    for first in range(0, vocab, step):
        last = min(first + step, vocab)
        list_texts_kernel[(triton.cdiv(last - first, 32),)](
            grad, factor, positions, cu_seqlens, entries, counts, d_bias, batch, vocab, first, last, grad.stride(0),
            HAS_LIST=has_list, HAS_BIAS=d_bias is not None, BLOCK_B=4, BLOCK_V=32, num_warps=1,
        )  # fmt: skip
        if has_list:
            dim = d_weight.shape[1]
            block_d = configs.weight_columns(dim)
            weight_grad_kernel[(triton.cdiv(last - first, configs.WORDS), triton.cdiv(dim, block_d))](
                hidden, entries, counts, d_weight, first, last,
                STRIDE=hidden.stride(0), D=dim, WORDS=configs.WORDS, BLOCK_D=block_d, PAIRS=in_pairs(hidden), num_warps=1,
            )  # fmt: skip
