"""What the gradient kernels share: active entries of (B, V), and weighted sums of the rows that a list names."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def in_pairs(table: Tensor) -> bool:
    """Whether the columns of a table, (rows, D), can be loaded two at a time as the halves of an integer."""
    pairs = table.dtype == torch.bfloat16 and table.shape[1] % 2 == 0 and table.stride(0) % 2 == 0
    return pairs and table.data_ptr() % 4 == 0


@triton.jit
def activity(grad, factor):
    """Gradient by the maximal logit in float32 (0 where inactive), and which entries are active.

    An infinite gradient of an output that did not fire has no effect: hence the selection before the product.
    """
    grad = grad.to(tl.float32)
    factor = factor.to(tl.float32)
    active = (factor > 0.0) & (grad != 0.0)
    return tl.where(active, grad, 0.0) * factor, active


@triton.jit
def load_active(grad_ptr, factor_ptr, mask):
    """The activity of what stands there, none where masked."""
    return activity(tl.load(grad_ptr, mask=mask, other=0.0), tl.load(factor_ptr, mask=mask, other=0.0))


@triton.jit
def make_entry(g, row):
    """An entry of a list, int64: the bits of its weight ``g`` above the number of a row."""
    return (g.to(tl.int32, bitcast=True).to(tl.int64) << 32) | row.to(tl.int64)


@triton.jit
def load_pair(list_ptr, list_stride, place, last, MASKED: tl.constexpr = True):
    """The entries of a list at ``place`` and after it; past its end zeros, or without MASKED whatever is there."""
    list_ptr += place * list_stride
    if MASKED:
        first = tl.load(list_ptr, mask=place < last, other=0)
        second = tl.load(list_ptr + list_stride, mask=place + 1 < last, other=0)
    else:
        first, second = tl.load(list_ptr), tl.load(list_ptr + list_stride)
    return first, second


@triton.jit
def _load_row(
    entry, wanted, table_ptr, column,
    STRIDE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PAIRS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Columns of the row that an entry names, (BLOCK_D,) or half as many pairs of them, from D on of any value.

    With MASKED zeros where it isn't wanted.
    """
    row = entry.to(tl.int32).to(tl.int64)
    if PAIRS:
        offs_d = column * (BLOCK_D // 2) + tl.arange(0, BLOCK_D // 2)
        value_ptr = table_ptr.to(tl.pointer_type(tl.int32)) + row * (STRIDE // 2) + offs_d
        mask = offs_d < D // 2
    else:
        offs_d = column * BLOCK_D + tl.arange(0, BLOCK_D)
        value_ptr = table_ptr + row * STRIDE + offs_d
        mask = offs_d < D
    if MASKED:
        value = tl.load(value_ptr, mask=mask & wanted, other=0)
    elif D % BLOCK_D == 0:
        value = tl.load(value_ptr)
    else:
        value = tl.load(value_ptr, mask=mask)
    return value


@triton.jit
def _load_rows(
    pair, place, last, table_ptr, column,
    STRIDE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PAIRS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Columns of the rows of two entries, the first at ``place``."""
    first = _load_row(pair[0], place < last, table_ptr, column, STRIDE, D, BLOCK_D, PAIRS, MASKED)
    return first, _load_row(pair[1], place + 1 < last, table_ptr, column, STRIDE, D, BLOCK_D, PAIRS, MASKED)


@triton.jit
def _add_rows(total, pair, rows, PAIRS: tl.constexpr):
    """Adds the rows of two entries to (BLOCK_D,) sums, each times its weight."""
    for i in tl.static_range(2):
        g = (pair[i] >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        row = rows[i]
        if PAIRS:
            # A bfloat16 is the upper half of a float32: an instruction for each, where its conversion may take two.
            even = g * (row << 16).to(tl.float32, bitcast=True)
            odd = g * (row & -65536).to(tl.float32, bitcast=True)
            total += tl.reshape(tl.join(even, odd), (2 * row.shape[0],))
        else:
            total += g * row.to(tl.float32)
    return total


@triton.jit
def _sum_steps(
    total, pair, next_pair, rows, list_ptr, list_stride, first, stop, last, table_ptr, column,
    STRIDE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PAIRS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds four entries a step from place ``first`` until ``stop``; gives what the next step starts with.

    That are the sums, the entries of two pairs and the rows of the first pair. Two rows are on their way while two are
    added, and the entries of the next two as well.
    """
    for place in range(first, stop, 4):
        next_rows = _load_rows(next_pair, place + 2, last, table_ptr, column, STRIDE, D, BLOCK_D, PAIRS, MASKED)
        later_pair = load_pair(list_ptr, list_stride, place + 4, last, MASKED)
        total = _add_rows(total, pair, rows, PAIRS)
        rows = _load_rows(later_pair, place + 4, last, table_ptr, column, STRIDE, D, BLOCK_D, PAIRS, MASKED)
        pair = later_pair
        later_pair = load_pair(list_ptr, list_stride, place + 6, last, MASKED)
        total = _add_rows(total, next_pair, next_rows, PAIRS)
        next_pair = later_pair
    return total, pair, next_pair, rows


@triton.jit
def sum_rows(
    pair, list_ptr, list_stride, first, last, table_ptr, column,
    STRIDE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """``sum g[e] * table[row[e]]`` over the places ``first .. last - 1`` of a list, for one block of columns.

    ``pair`` are the first two entries, as :func:`load_pair` gives them. A step also loads for the next one: as long as
    that one is whole nothing is masked, which takes 27 instructions an entry where masks take 34 (sm_90).
    """
    total = tl.zeros((BLOCK_D,), tl.float32)
    rows = _load_rows(pair, first, last, table_ptr, column, STRIDE, D, BLOCK_D, PAIRS, True)
    next_pair = load_pair(list_ptr, list_stride, first + 2, last)
    stop = first + tl.maximum(last - first - 4, 0) // 4 * 4
    total, pair, next_pair, rows = _sum_steps(
        total, pair, next_pair, rows, list_ptr, list_stride, first, stop, last, table_ptr, column,
        STRIDE, D, BLOCK_D, PAIRS, False,
    )  # fmt: skip
    total, _, _, _ = _sum_steps(
        total, pair, next_pair, rows, list_ptr, list_stride, stop, last, last, table_ptr, column,
        STRIDE, D, BLOCK_D, PAIRS, True,
    )  # fmt: skip
    return total


@triton.jit
def store_columns(row_ptr, total, column, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Writes one block of columns of one row, in its dtype."""
    offs_d = column * BLOCK_D + tl.arange(0, BLOCK_D)
    tl.store(row_ptr + offs_d, total.to(row_ptr.dtype.element_ty), mask=offs_d < D)
