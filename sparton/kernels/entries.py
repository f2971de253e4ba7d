"""What the gradient kernels share: active entries of (B, V), lists of them, and weighted sums of the rows they name."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_active(grad_ptr, factor_ptr, mask):
    """Gradient by the maximal logit in float32 (0 where inactive), and which entries are active.

    An infinite gradient of an output that did not fire has no effect: hence the selection before the product.
    """
    factor = tl.load(factor_ptr, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr, mask=mask, other=0.0).to(tl.float32)
    active = (factor > 0.0) & (grad != 0.0)
    return tl.where(active, grad, 0.0) * factor, active


@triton.jit
def make_entry(g, row):
    """An entry of a list, int64: the bits of ``g`` above the number of a row."""
    return (g.to(tl.int32, bitcast=True).to(tl.int64) << 32) | row.to(tl.int64)


@triton.jit
def load_entries(list_ptr, first, last, ENTRIES: tl.constexpr):
    """The entries from place ``first`` on; past the end of a list its last one, of an empty list zeros."""
    return tl.load(list_ptr + tl.minimum(first + tl.arange(0, ENTRIES), last - 1), mask=last > 0, other=0)


@triton.jit
def _load_rows(
    entries, table_ptr, stride, mask, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_REST: tl.constexpr
):  # fmt: skip
    """The rows that entries name, in two blocks of columns: (ENTRIES, BLOCK_D) and (ENTRIES, BLOCK_REST)."""
    WIDTH: tl.constexpr = BLOCK_D + BLOCK_REST
    row_ptr = table_ptr + ((entries & 0xFFFFFFFF) * stride)[:, None]
    offs_d = (tl.program_id(1) * WIDTH + tl.arange(0, BLOCK_D))[None, :]
    offs_rest = (tl.program_id(1) * WIDTH + BLOCK_D + tl.arange(0, BLOCK_REST))[None, :]
    if D % WIDTH == 0:
        return tl.load(row_ptr + offs_d, mask=mask), tl.load(row_ptr + offs_rest, mask=mask)
    else:
        return (
            tl.load(row_ptr + offs_d, mask=mask & (offs_d < D), other=0.0),
            tl.load(row_ptr + offs_rest, mask=mask & (offs_rest < D), other=0.0),
        )


@triton.jit
def sum_rows(
    entries, list_ptr, first, last, table_ptr, stride,
    D: tl.constexpr, ENTRIES: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """``sum g[e] * table[row[e]]`` over the places ``first .. last - 1`` of a list, for the columns of this program.

    ``entries`` are the first ENTRIES of them. Rows are loaded one step ahead and entries two, so that all loads of a step
    are under way at once. The columns are cut in two blocks, powers of two, which leave fewer lanes idle than one
    (768 = 512 + 256).
    """
    total = tl.zeros((BLOCK_D,), tl.float32)
    rest = tl.zeros((BLOCK_REST,), tl.float32)
    values, values_rest = _load_rows(entries, table_ptr, stride, first < last, D, BLOCK_D, BLOCK_REST)
    next_entries = load_entries(list_ptr, first + ENTRIES, last, ENTRIES)
    for start in range(first, last, ENTRIES):
        later_entries = load_entries(list_ptr, start + 2 * ENTRIES, last, ENTRIES)
        next_values, next_rest = _load_rows(
            next_entries, table_ptr, stride, start + ENTRIES < last, D, BLOCK_D, BLOCK_REST
        )
        # Past the end the last entry is repeated: without weight.
        g = (entries >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        g = tl.where(start + tl.arange(0, ENTRIES) < last, g, 0.0)[:, None]
        total += tl.sum(g * values.to(tl.float32), axis=0)
        rest += tl.sum(g * values_rest.to(tl.float32), axis=0)
        values = next_values
        values_rest = next_rest
        entries = next_entries
        next_entries = later_entries
    return total, rest


@triton.jit
def add_sums(total, rest, row_ptr, D: tl.constexpr):
    """Adds the columns of this program of one float32 row."""
    block: tl.constexpr = total.shape[0]
    block_rest: tl.constexpr = rest.shape[0]
    first = tl.program_id(1) * (block + block_rest)
    offs_d = first + tl.arange(0, block)
    offs_rest = first + block + tl.arange(0, block_rest)
    total += tl.load(row_ptr + offs_d, mask=offs_d < D, other=0.0)
    rest += tl.load(row_ptr + offs_rest, mask=offs_rest < D, other=0.0)
    return total, rest


@triton.jit
def store_sums(row_ptr, total, rest, D: tl.constexpr):
    """Writes the columns of this program of one row, in its dtype."""
    block: tl.constexpr = total.shape[0]
    block_rest: tl.constexpr = rest.shape[0]
    first = tl.program_id(1) * (block + block_rest)
    offs_d = first + tl.arange(0, block)
    offs_rest = first + block + tl.arange(0, block_rest)
    tl.store(row_ptr + offs_d, total.to(row_ptr.dtype.element_ty), mask=offs_d < D)
    tl.store(row_ptr + offs_rest, rest.to(row_ptr.dtype.element_ty), mask=offs_rest < D)
