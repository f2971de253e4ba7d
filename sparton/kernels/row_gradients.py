"""The next gradient by hidden, with SPARTON_PREVIEW=1: a stable counting sort by row, then balanced sums."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparton.kernels import configs
from sparton.kernels.word_gradients import load_active, weighted_sum


@triton.jit(do_not_specialize=["first_b"])
def place_kernel(
    grad_ptr,
    factor_ptr,
    positions_ptr,
    cu_seqlens_ptr,
    table_ptr,
    starts_ptr,
    order_ptr,
    first_b,
    V,
    R,
    stride_gb,
    stride_gv,
    PLACE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: CHUNK words of one text, BLOCK at a time in ascending order. Nobody else touches its cells of the table.

    First they count what each row wins in the chunk: ``table[chunk, row]``. Once the table holds what the chunks before
    won, PLACE writes each active word to its place in the order by row.
    """
    b = (first_b + tl.program_id(0)).to(tl.int64)
    chunk = tl.program_id(1)
    begin = tl.load(cu_seqlens_ptr + b).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    for first in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, V), BLOCK):
        offs_v = (first + offs).to(tl.int64)
        mask = offs_v < V
        _, active = load_active(grad_ptr, factor_ptr, b * stride_gb + offs_v * stride_gv, b * V + offs_v, mask)
        if tl.max(active.to(tl.int32), axis=0) > 0:
            position = tl.load(positions_ptr + b * V + offs_v, mask=active, other=0).to(tl.int32)
            same = (position[:, None] == position[None, :]) & active[None, :]
            rank = tl.sum((same & (offs[None, :] < offs[:, None])).to(tl.int32), axis=1)
            last = rank == tl.sum(same.to(tl.int32), axis=1) - 1
            row = begin + position
            cell = table_ptr + chunk.to(tl.int64) * R + row
            before = tl.load(cell, mask=active, other=0)
            if PLACE:
                start = tl.load(starts_ptr + row, mask=active, other=0)
                tl.store(order_ptr + start + before + rank, offs_v.to(tl.int32), mask=active)
            # Between loads and stores of the same cells: one thread counts on for all that share a row.
            tl.debug_barrier()
            tl.store(cell, before + rank + 1, mask=active & last)
            tl.debug_barrier()


@triton.jit(do_not_specialize=["R", "num_chunks"])
def prefix_kernel(table_ptr, totals_ptr, R, num_chunks, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr):
    """One program: BLOCK_R columns of the table become sums over the chunks before; their totals are written."""
    offs_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    total = tl.zeros((BLOCK_R,), tl.int32)
    for first in range(0, num_chunks, BLOCK_C):
        offs_c = first + tl.arange(0, BLOCK_C)
        cell = table_ptr + offs_c.to(tl.int64)[:, None] * R + offs_r[None, :]
        mask = (offs_c < num_chunks)[:, None] & mask_r[None, :]
        won = tl.load(cell, mask=mask, other=0)
        tl.store(cell, total[None, :] + tl.cumsum(won, axis=0) - won, mask=mask)
        total += tl.sum(won, axis=0)
    tl.store(totals_ptr + offs_r, total, mask=mask_r)


@triton.jit
def _count_up_to(offsets_ptr, length, value, BLOCK: tl.constexpr):
    """How many of the ascending ``offsets[1 .. length]`` are at most ``value``."""
    count = 0
    for first in range(0, length, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        offset = tl.load(offsets_ptr + 1 + offs, mask=offs < length, other=0)
        count += tl.sum(((offs < length) & (offset <= value)).to(tl.int32), axis=0)
    return count


@triton.jit
def _sum_entries(
    grad_ptr, factor_ptr, order_ptr, weight_ptr, b, first, last, V, stride_gb, stride_gv, stride_wv, offs_d, mask_d,
    ENTRIES: tl.constexpr,
):  # fmt: skip
    """Sum over the words at places first .. last - 1 of text b."""
    total = tl.zeros_like(offs_d).to(tl.float32)
    for start in range(first, last, ENTRIES):
        offs_e = start + tl.arange(0, ENTRIES)
        mask = offs_e < last
        word = tl.load(order_ptr + offs_e, mask=mask, other=0).to(tl.int64)
        g, _ = load_active(grad_ptr, factor_ptr, b * stride_gb + word * stride_gv, b * V + word, mask)
        total += weighted_sum(g, weight_ptr, word, stride_wv, offs_d, mask, mask_d)
    return total


@triton.jit(do_not_specialize=["B", "R", "first_b", "last_b"])
def row_sums_kernel(
    grad_ptr,
    factor_ptr,
    weight_ptr,
    cu_seqlens_ptr,
    starts_ptr,
    order_ptr,
    parts_ptr,
    grad_hidden_ptr,
    B,
    V,
    D,
    R,
    first_b,
    last_b,
    stride_gb,
    stride_gv,
    stride_wv,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_D columns of a row's gradient, or with PARTS of a part of it.

    Rows with more than PART entries are cut where the places are multiples of PART. A program of PARTS sums from one such
    place on; a row's own program then sums what comes before the first of them, and adds the parts in order.
    """
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    if PARTS:
        place = tl.program_id(0) * PART
        low = 0
        high = R  # the row with starts[row] <= place < starts[row + 1], if there is one
        while low < high:
            middle = (low + high) // 2
            if tl.load(starts_ptr + middle + 1) <= place:
                low = middle + 1
            else:
                high = middle
        row = low
    else:
        place = 0
        row = tl.program_id(0)
    if row < R:
        first = tl.load(starts_ptr + row)
        last = tl.load(starts_ptr + row + 1)
        long = last - first > PART
        b = _count_up_to(cu_seqlens_ptr, B, row, BLOCK_B).to(tl.int64)
        if PARTS:
            if long:
                total = _sum_entries(
                    grad_ptr, factor_ptr, order_ptr, weight_ptr, b, place, tl.minimum(place + PART, last),
                    V, stride_gb, stride_gv, stride_wv, offs_d, mask_d, ENTRIES,
                )  # fmt: skip
                tl.store(parts_ptr + tl.program_id(0).to(tl.int64) * D + offs_d, total, mask=mask_d)
        else:
            # Rows past the last text, which have no entries, belong to the last range of texts.
            if ((b >= first_b) & (b < last_b)) | ((b == B) & (last_b == B)):
                cut = tl.where(long, tl.cdiv(first, PART) * PART, last)
                total = _sum_entries(
                    grad_ptr, factor_ptr, order_ptr, weight_ptr, b, first, cut,
                    V, stride_gb, stride_gv, stride_wv, offs_d, mask_d, ENTRIES,
                )  # fmt: skip
                part_ptr = parts_ptr + (cut // PART).to(tl.int64) * D
                for _ in range(cut // PART, tl.where(long, tl.cdiv(last, PART), cut // PART)):
                    total += tl.load(part_ptr + offs_d, mask=mask_d, other=0.0)
                    part_ptr += D
                target = grad_hidden_ptr + row.to(tl.int64) * D + offs_d
                tl.store(target, total.to(grad_hidden_ptr.dtype.element_ty), mask=mask_d)


def row_gradients(
    grad: Tensor, factor: Tensor, positions: Tensor, weight: Tensor, cu_seqlens: Tensor, d_hidden: Tensor
) -> None:
    """Fills the gradient by hidden, (N, D).

    The order has room for all words of a text, 4 bytes each; texts are taken in ranges whose orders fit
    ``configs.WORKSPACE``.
    """
    (batch, vocab), (tokens, dim), device = factor.shape, d_hidden.shape, factor.device
    step = max(1, min(batch, configs.WORKSPACE // (4 * max(vocab, 1))))
    chunks = triton.cdiv(vocab, configs.CHUNK_WORDS)
    order = torch.empty(step * vocab, dtype=torch.int32, device=device)
    parts = torch.empty(triton.cdiv(step * vocab, configs.PART_ENTRIES), dim, dtype=torch.float32, device=device)
    starts = torch.zeros(tokens + 1, dtype=torch.int32, device=device)
    totals = torch.empty(tokens, dtype=torch.int32, device=device)
    block_d, num_warps = configs.backward_block(dim)
    columns = triton.cdiv(dim, block_d)
    for first in range(0, batch, step):
        last = min(first + step, batch)
        table = torch.zeros(chunks, tokens, dtype=torch.int32, device=device)
        for place in (False, True):
            place_kernel[(last - first, chunks)](
                grad, factor, positions, cu_seqlens, table, starts, order, first, vocab, tokens, *grad.stride(),
                PLACE=place, CHUNK=configs.CHUNK_WORDS, BLOCK=64, num_warps=2,
            )  # fmt: skip
            if not place:
                prefix_kernel[(triton.cdiv(tokens, 32),)](table, totals, tokens, chunks, BLOCK_C=64, BLOCK_R=32)
                torch.cumsum(totals, 0, dtype=torch.int32, out=starts[1:])
        # Parts before rows, which add them up.
        for grid, is_part in ((len(parts), True), (tokens, False)):
            row_sums_kernel[(grid, columns)](
                grad, factor, weight, cu_seqlens, starts, order, parts, d_hidden, batch, vocab, dim, tokens, first, last,
                *grad.stride(), weight.stride(0),
                PARTS=is_part, PART=configs.PART_ENTRIES, ENTRIES=configs.ENTRIES, BLOCK_B=1024, BLOCK_D=block_d,
                num_warps=num_warps,
            )  # fmt: skip
