"""What the gradient kernels share: which entries of (B, V) are active, and weighted sums of rows in float32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_active(grad_ptr, factor_ptr, offs_grad, offs_out, mask):
    """Gradient by the maximal logit in float32 (0 where inactive), and which entries are active.

    An infinite gradient of an output that did not fire has no effect: hence the selection before the product.
    """
    factor = tl.load(factor_ptr + offs_out, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + offs_grad, mask=mask, other=0.0).to(tl.float32)
    active = (factor > 0.0) & (grad != 0.0)
    return tl.where(active, grad, 0.0) * factor, active


@triton.jit
def _weighted_sum(g, table_ptr, offs_row, mask, offs_d, D: tl.constexpr):
    values = tl.load(
        table_ptr + offs_row[:, None] + offs_d[None, :], mask=mask[:, None] & (offs_d < D)[None, :], other=0.0
    )
    return tl.sum(g[:, None] * values.to(tl.float32), axis=0)


@triton.jit
def add_rows(total, rest, g, table_ptr, offs_row, mask, D: tl.constexpr):
    """Adds ``sum_e g[e] * table[row of e]`` to the columns of this program; rows that are masked aren't read.

    The columns are those of ``total`` and, behind them, of ``rest``: blocks are powers of two, so two of them leave
    fewer lanes idle than one (768 = 512 + 256).
    """
    block: tl.constexpr = total.shape[0]
    block_rest: tl.constexpr = rest.shape[0]
    first = tl.program_id(1) * (block + block_rest)
    total += _weighted_sum(g, table_ptr, offs_row, mask, first + tl.arange(0, block), D)
    rest += _weighted_sum(g, table_ptr, offs_row, mask, first + block + tl.arange(0, block_rest), D)
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
