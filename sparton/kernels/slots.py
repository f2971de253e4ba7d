"""A packed copy of hidden in which every text owns whole groups of rows, so that the product needs no masks."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparton.kernels.configs import GROUP, ForwardPlan

# Texts whose slots a program adds up at a time: one number, so that one compiled kernel serves every batch.
BLOCK_B = 512


class Slots(NamedTuple):
    """Rows of all texts, each in a slot of its own.

    Attributes:
        rows: (R, D) in the product's dtype; slot rows past a text's length repeat its last row, which can't change a
            maximum. Rows past the last slot are zeros.
        starts: (B + 2,) int32, first row of each slot, multiples of GROUP, and where the last one ends; then the rows
            that every slot has if all were made equal, a power of two, or 0.
    """

    rows: Tensor
    starts: Tensor


@triton.jit(do_not_specialize=["B", "R", "EQUAL", "EQUAL_FROM"])  # what differs from batch to batch
def slots_kernel(
    hidden_ptr,
    cu_seqlens_ptr,
    rows_ptr,
    starts_ptr,
    B,
    R,
    D,
    stride_hn,
    EQUAL,
    EQUAL_FROM,
    GROUP: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: GROUP rows of a slot. Each finds its text by summing the slots before it; the first writes them."""
    first = tl.program_id(0) * GROUP
    equal = tl.where(tl.load(cu_seqlens_ptr + B) >= EQUAL_FROM, EQUAL, 0)
    unit = tl.maximum(equal, GROUP)
    text = 0
    start = 0
    total = 0
    for block in range(0, B, BLOCK_B):
        offs_b = block + tl.arange(0, BLOCK_B)
        mask_b = offs_b < B
        begin = tl.load(cu_seqlens_ptr + offs_b, mask=mask_b, other=0)
        length = (tl.load(cu_seqlens_ptr + offs_b + 1, mask=mask_b, other=0) - begin).to(tl.int32)
        slot = tl.where(mask_b, tl.maximum(tl.cdiv(length, unit), 1) * unit, 0)
        stop = total + tl.cumsum(slot, axis=0)
        before = mask_b & (stop <= first)
        text += tl.sum(before.to(tl.int32), axis=0)
        start = tl.maximum(start, tl.max(tl.where(before, stop, 0), axis=0))
        total += tl.sum(slot, axis=0)
        if first == 0:
            tl.store(starts_ptr + offs_b + 1, stop, mask=mask_b)
    if first == 0:
        tl.store(starts_ptr, 0)
        tl.store(starts_ptr + B + 1, equal)
    # Rows past the last slot become zeros: a tile may reach into them.
    begin = tl.load(cu_seqlens_ptr + text).to(tl.int64)
    length = tl.load(cu_seqlens_ptr + tl.minimum(text + 1, B)).to(tl.int64) - begin
    offs_r = first + tl.arange(0, GROUP)
    source = begin + tl.minimum(offs_r - start, length - 1)
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        value = tl.load(
            hidden_ptr + source[:, None] * stride_hn + offs_d[None, :], mask=mask_d[None, :] & (length > 0), other=0.0
        )
        target = rows_ptr + offs_r.to(tl.int64)[:, None] * D + offs_d[None, :]
        mask = (offs_r < R)[:, None] & mask_d[None, :]
        tl.store(target, value.to(rows_ptr.dtype.element_ty), mask=mask)


def make_slots(hidden: Tensor, cu_seqlens: Tensor, dtype: torch.dtype, plan: ForwardPlan) -> Slots:
    """Launches the copy.

    Args:
        hidden: (N, D) with unit stride along D; cu_seqlens: (B + 1,).
        dtype: of the copy.
        plan: its ``equal``, ``equal_from`` and ``rows``, the upper bound of R.
    """
    batch, dim = len(cu_seqlens) - 1, hidden.shape[1]
    rows = torch.empty(plan.rows, dim, dtype=dtype, device=hidden.device)
    starts = torch.empty(batch + 2, dtype=torch.int32, device=hidden.device)
    slots_kernel[(triton.cdiv(plan.rows, GROUP),)](
        hidden, cu_seqlens, rows, starts, batch, plan.rows, dim, hidden.stride(0), plan.equal,
        plan.equal_from, GROUP=GROUP, BLOCK_B=BLOCK_B, BLOCK_D=min(max(triton.next_power_of_2(dim), 16), 256),
    )  # fmt: skip
    return Slots(rows, starts)
