"""What the gradient kernels share: active entries of (B, V), and weighted sums of the rows that a list names."""

from __future__ import annotations

import triton
import triton.language as tl


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
def load_entries(list_ptr, list_stride, first, last, ENTRIES: tl.constexpr):
    """The entries of a list from place ``first`` on; past its end the last one, of an empty list zeros."""
    place = tl.minimum(first + tl.arange(0, ENTRIES), last - 1)
    return tl.load(list_ptr + place * list_stride, mask=last > 0, other=0)


@triton.jit
def _load_rows(
    entries, start, last, table_ptr, stride, column, D: tl.constexpr, ENTRIES: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Weights (ENTRIES,) of the entries at the places from ``start`` on, 0 past ``last``, and their rows' columns."""
    g = (entries >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    g = tl.where(start + tl.arange(0, ENTRIES) < last, g, 0.0)
    offs_d = column * BLOCK_D + tl.arange(0, BLOCK_D)
    value_ptr = table_ptr + ((entries & 0xFFFFFFFF) * stride)[:, None] + offs_d[None, :]
    # One mask for all: what is past the end repeats a row that is there, so nothing else has to be left out.
    if D % BLOCK_D == 0:
        return g, tl.load(value_ptr, mask=start < last)
    else:
        return g, tl.load(value_ptr, mask=(start < last) & (offs_d < D)[None, :], other=0.0)


@triton.jit
def sum_rows(
    entries, list_ptr, list_stride, first, last, table_ptr, stride, column,
    D: tl.constexpr, ENTRIES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``sum g[e] * table[row[e]]`` over the places ``first .. last - 1`` of a list, for one block of columns.

    ``entries`` are the first of them, as :func:`load_entries` gives them. Rows are loaded one step ahead and entries
    two, so that all loads of a step are under way at once.
    """
    total = tl.zeros((BLOCK_D,), tl.float32)
    g, values = _load_rows(entries, first, last, table_ptr, stride, column, D, ENTRIES, BLOCK_D)
    entries = load_entries(list_ptr, list_stride, first + ENTRIES, last, ENTRIES)
    for start in range(first, last, ENTRIES):
        next_g, next_values = _load_rows(
            entries, start + ENTRIES, last, table_ptr, stride, column, D, ENTRIES, BLOCK_D
        )
        entries = load_entries(list_ptr, list_stride, start + 2 * ENTRIES, last, ENTRIES)
        total += tl.sum(g[:, None] * values.to(tl.float32), axis=0)
        g = next_g
        values = next_values
    return total


@triton.jit
def store_columns(row_ptr, total, column, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Writes one block of columns of one row, in its dtype."""
    offs_d = column * BLOCK_D + tl.arange(0, BLOCK_D)
    tl.store(row_ptr + offs_d, total.to(row_ptr.dtype.element_ty), mask=offs_d < D)
