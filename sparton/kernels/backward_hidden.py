"""The gradient by hidden: a stable counting sort of each text's active words by row, then balanced sums."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparton.kernels import configs
from sparton.kernels.entries import add_rows, add_sums, load_active, store_sums


@triton.jit(do_not_specialize=["R", "first_b", "chunk_words", "num_chunks", "stride_gb"])
def histogram_kernel(
    grad_ptr,
    factor_ptr,
    positions_ptr,
    cu_seqlens_ptr,
    entries_ptr,
    counts_ptr,
    table_ptr,
    V,
    R,
    first_b,
    chunk_words,
    num_chunks,
    stride_gb,
    stride_gv,
    BLOCK_V: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BINS: tl.constexpr,
):
    """One program: a chunk of one text's words. Lists the active ones and counts how many each row of the text wins.

    ``entries``: places within the chunk, ascending; ``counts``: how many; ``table[chunk, row]``: won by that row.
    """
    text = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    b = first_b + text
    begin = chunk * chunk_words
    entries_ptr += text * V + begin
    n = 0
    for first in range(0, tl.minimum(chunk_words, V - begin), BLOCK_V):
        offs_c = first + tl.arange(0, BLOCK_V)
        offs_v = (begin + offs_c).to(tl.int64)
        _, active = load_active(grad_ptr, factor_ptr, b * stride_gb + offs_v * stride_gv, b * V + offs_v, offs_v < V)
        one = active.to(tl.int32)
        tl.store(entries_ptr + n + tl.cumsum(one, axis=0) - one, offs_c.to(tl.int16), mask=active)
        n += tl.sum(one, axis=0)
    tl.store(counts_ptr + text * num_chunks + chunk, n)
    tl.debug_barrier()  # the list is read by other threads than wrote it

    start = tl.load(cu_seqlens_ptr + b).to(tl.int64)
    length = (tl.load(cu_seqlens_ptr + b + 1).to(tl.int64) - start).to(tl.int32)
    for low in range(0, length, BINS):  # long texts take several passes: a histogram's cost grows with its bins
        won = tl.zeros((BINS,), tl.int32)
        for first in range(0, n, BLOCK_E):
            offs_e = first + tl.arange(0, BLOCK_E)
            mask = offs_e < n
            offs_v = begin + tl.load(entries_ptr + offs_e, mask=mask, other=0).to(tl.int32)
            position = tl.load(positions_ptr + b * V + offs_v, mask=mask, other=0).to(tl.int32) - low
            won += tl.histogram(position, BINS, mask=mask & (position >= 0) & (position < BINS))
        offs_s = low + tl.arange(0, BINS)
        tl.store(table_ptr + chunk.to(tl.int64) * R + start + offs_s, won, mask=offs_s < length)


@triton.jit(do_not_specialize=["R", "first_b", "num_chunks"])
def scan_kernel(
    table_ptr,
    starts_ptr,
    ends_ptr,
    texts_ptr,
    cu_seqlens_ptr,
    R,
    first_b,
    num_chunks,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program: the rows of one text. The table becomes sums over the chunks before.

    Row r of text ``texts[r]`` gets the places ``starts[r] .. ends[r] - 1`` of that text's order.
    """
    b = first_b + tl.program_id(0)
    start = tl.load(cu_seqlens_ptr + b).to(tl.int64)
    length = (tl.load(cu_seqlens_ptr + b + 1).to(tl.int64) - start).to(tl.int32)
    before = 0
    for low in range(0, length, BLOCK_R):
        offs_s = low + tl.arange(0, BLOCK_R)
        mask_s = offs_s < length
        offs_r = start + offs_s
        total = tl.zeros((BLOCK_R,), tl.int32)
        for first in range(0, num_chunks, BLOCK_C):
            offs_c = first + tl.arange(0, BLOCK_C)
            cell = table_ptr + offs_c.to(tl.int64)[:, None] * R + offs_r[None, :]
            mask = (offs_c < num_chunks)[:, None] & mask_s[None, :]
            won = tl.load(cell, mask=mask, other=0)
            tl.store(cell, total[None, :] + tl.cumsum(won, axis=0) - won, mask=mask)
            total += tl.sum(won, axis=0)
        end = before + tl.cumsum(total, axis=0)
        tl.store(starts_ptr + offs_r, end - total, mask=mask_s)
        tl.store(ends_ptr + offs_r, end, mask=mask_s)
        tl.store(texts_ptr + offs_r, tl.zeros((BLOCK_R,), tl.int32) + b, mask=mask_s)
        before += tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["R", "first_b", "chunk_words", "num_chunks"])
def place_kernel(
    positions_ptr,
    cu_seqlens_ptr,
    entries_ptr,
    counts_ptr,
    table_ptr,
    starts_ptr,
    order_ptr,
    V,
    R,
    first_b,
    chunk_words,
    num_chunks,
    BLOCK_E: tl.constexpr,
):
    """One program: writes the active words of one chunk of one text to their places in the order by row.

    Within a row words stay ascending, so sums have one order and rows that are summed together read the same words.
    Nobody else touches the program's cells of the table.
    """
    text = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    b = first_b + text
    start = tl.load(cu_seqlens_ptr + b).to(tl.int64)
    begin = chunk * chunk_words
    n = tl.load(counts_ptr + text * num_chunks + chunk)
    offs = tl.arange(0, BLOCK_E)
    # For entry j: 1 for each entry i before it, 2 * BLOCK_E for each after it.
    weight = (offs[:, None] < offs[None, :]).to(tl.int32) + (offs[:, None] > offs[None, :]).to(tl.int32) * (2 * BLOCK_E)
    for first in range(0, n, BLOCK_E):
        mask = first + offs < n
        offs_v = begin + tl.load(entries_ptr + text * V + begin + first + offs, mask=mask, other=0).to(tl.int32)
        position = tl.load(positions_ptr + b * V + offs_v, mask=mask, other=0).to(tl.int32)
        key = tl.where(mask, position, -1 - offs)  # what is masked shares a row with nobody
        same = tl.sum(tl.where(key[:, None] == key[None, :], weight, 0), axis=0)
        row = start + position
        cell = table_ptr + chunk.to(tl.int64) * R + row
        place = tl.load(cell, mask=mask, other=0) + same % (2 * BLOCK_E)
        tl.store(order_ptr + text * V + tl.load(starts_ptr + row, mask=mask, other=0) + place, offs_v, mask=mask)
        # The last entry of a row counts on for all, after all have read the cell and before they read it again.
        tl.debug_barrier()
        tl.store(cell, place + 1, mask=mask & (same < 2 * BLOCK_E))
        tl.debug_barrier()


@triton.jit
def _sum_words(
    grad_ptr, factor_ptr, order_ptr, weight_ptr, b, first, last, V, stride_gb, stride_gv, stride_wv,
    D: tl.constexpr, ENTRIES: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """``sum g[b, v] * weight[v]`` over the words v at the places first .. last - 1 of an order of text b."""
    total = tl.zeros((BLOCK_D,), tl.float32)
    rest = tl.zeros((BLOCK_REST,), tl.float32)
    for start in range(first, last, ENTRIES):
        offs_e = start + tl.arange(0, ENTRIES)
        mask = offs_e < last
        v = tl.load(order_ptr + offs_e, mask=mask, other=0).to(tl.int64)
        g, _ = load_active(grad_ptr, factor_ptr, b * stride_gb + v * stride_gv, b * V + v, mask)
        total, rest = add_rows(total, rest, g, weight_ptr, v * stride_wv, mask, D)
    return total, rest


@triton.jit(do_not_specialize=["first_b", "parts_per_text", "stride_gb"])
def long_rows_kernel(
    grad_ptr,
    factor_ptr,
    weight_ptr,
    cu_seqlens_ptr,
    starts_ptr,
    ends_ptr,
    order_ptr,
    partials_ptr,
    V,
    first_b,
    parts_per_text,
    stride_gb,
    stride_gv,
    stride_wv,
    D: tl.constexpr,
    PART: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """One program: PART places of a text's order from a multiple of PART on, if a row with more than PART has them.

    At most one row stands at such a place, so a part needs no other name than the place.
    """
    text = (tl.program_id(0) // parts_per_text).to(tl.int64)
    place = tl.program_id(0) % parts_per_text * PART
    b = first_b + text
    begin = tl.load(cu_seqlens_ptr + b).to(tl.int64)
    length = (tl.load(cu_seqlens_ptr + b + 1).to(tl.int64) - begin).to(tl.int32)
    if place < tl.load(ends_ptr + begin + length - 1, mask=length > 0, other=0):
        row = begin
        for low in range(0, length, BLOCK_S):
            offs_s = low + tl.arange(0, BLOCK_S)
            end = tl.load(ends_ptr + begin + offs_s, mask=offs_s < length, other=place + 1)
            row += tl.sum((end <= place).to(tl.int32), axis=0)
        end = tl.load(ends_ptr + row)
        if end - tl.load(starts_ptr + row) > PART:
            total, rest = _sum_words(
                grad_ptr, factor_ptr, order_ptr + text * V, weight_ptr, b, place, tl.minimum(place + PART, end), V,
                stride_gb, stride_gv, stride_wv, D, ENTRIES, BLOCK_D, BLOCK_REST,
            )  # fmt: skip
            store_sums(partials_ptr + tl.program_id(0).to(tl.int64) * D, total, rest, D)


@triton.jit(do_not_specialize=["B", "R", "first_b", "last_b", "parts_per_text", "stride_gb"])
def hidden_grad_kernel(
    grad_ptr,
    factor_ptr,
    weight_ptr,
    cu_seqlens_ptr,
    starts_ptr,
    ends_ptr,
    texts_ptr,
    order_ptr,
    partials_ptr,
    grad_hidden_ptr,
    B,
    V,
    R,
    first_b,
    last_b,
    parts_per_text,
    stride_gb,
    stride_gv,
    stride_wv,
    D: tl.constexpr,
    PART: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """One program: the gradient of one row, if its text is one of first_b .. last_b - 1.

    A row with more than PART words sums those before its first part itself and adds the parts in order.
    """
    row = tl.program_id(0).to(tl.int64)
    # Rows past the last text get their zeros with the last range of texts.
    stop = tl.load(cu_seqlens_ptr + last_b, mask=last_b < B, other=R).to(tl.int64)
    if (row >= tl.load(cu_seqlens_ptr + first_b).to(tl.int64)) & (row < stop):
        owned = row < tl.load(cu_seqlens_ptr + B).to(tl.int64)
        b = tl.load(texts_ptr + row, mask=owned, other=first_b).to(tl.int64)
        first = tl.load(starts_ptr + row, mask=owned, other=0)
        last = tl.load(ends_ptr + row, mask=owned, other=0)
        cut = last
        if last - first > PART:
            cut = tl.cdiv(first, PART) * PART
        total, rest = _sum_words(
            grad_ptr, factor_ptr, order_ptr + (b - first_b) * V, weight_ptr, b, first, cut, V,
            stride_gb, stride_gv, stride_wv, D, ENTRIES, BLOCK_D, BLOCK_REST,
        )  # fmt: skip
        for place in range(cut, last, PART):
            part = (b - first_b) * parts_per_text + place // PART
            total, rest = add_sums(total, rest, partials_ptr + part * D, D)
        store_sums(grad_hidden_ptr + row * D, total, rest, D)


def _sort(
    grad: Tensor, factor: Tensor, positions: Tensor, cu_seqlens: Tensor, first: int, texts: int, tokens: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Orders the active words of ``texts`` texts from ``first`` on by row.

    Returns:
        The order (texts * V,) and for each of the N rows its first and last place in it and its text, all int32.
    """
    vocab, device = factor.shape[1], factor.device
    chunk_words = configs.chunk_words(vocab, tokens)
    chunks = triton.cdiv(vocab, chunk_words)
    order, entries = (torch.empty(texts * vocab, dtype=dtype, device=device) for dtype in (torch.int32, torch.int16))
    counts, table, starts, ends, owners = (
        torch.empty(size, dtype=torch.int32, device=device)
        for size in (texts * chunks, chunks * tokens, tokens, tokens, tokens)
    )
    histogram_kernel[(texts, chunks)](
        grad, factor, positions, cu_seqlens, entries, counts, table, vocab, tokens, first, chunk_words, chunks,
        *grad.stride(), BLOCK_V=configs.LEAST_CHUNK_WORDS, BLOCK_E=512, BINS=512, num_warps=4,
    )  # fmt: skip
    scan_kernel[(texts,)](
        table, starts, ends, owners, cu_seqlens, tokens, first, chunks, BLOCK_C=64, BLOCK_R=128, num_warps=8
    )
    place_kernel[(texts, chunks)](
        positions, cu_seqlens, entries, counts, table, starts, order, vocab, tokens, first, chunk_words, chunks,
        BLOCK_E=32, num_warps=1,
    )  # fmt: skip
    return order, starts, ends, owners


def hidden_gradient(
    grad: Tensor, factor: Tensor, positions: Tensor, weight: Tensor, cu_seqlens: Tensor, d_hidden: Tensor
) -> None:
    """Fills the gradient by hidden, (N, D).

    The order and the list of a text's active words have room for all words, its partial sums for all parts; texts are
    taken in ranges for which this fits ``configs.WORKSPACE`` bytes.
    """
    (batch, vocab), (tokens, dim) = factor.shape, d_hidden.shape
    part = configs.PART_ENTRIES
    parts_per_text = triton.cdiv(vocab, part)
    block_d, block_rest, columns = configs.gradient_columns(dim)
    fits = max(1, configs.WORKSPACE // (6 * vocab + 4 * parts_per_text * dim))
    step = triton.cdiv(batch, triton.cdiv(batch, fits))
    for first in range(0, batch, step):
        last = min(first + step, batch)
        order, starts, ends, owners = _sort(grad, factor, positions, cu_seqlens, first, last - first, tokens)
        parts = (last - first) * parts_per_text
        partials = torch.empty(parts, dim, dtype=torch.float32, device=grad.device)
        # Parts before rows, which add them up.
        long_rows_kernel[(parts, columns)](
            grad, factor, weight, cu_seqlens, starts, ends, order, partials, vocab, first, parts_per_text,
            *grad.stride(), weight.stride(0), D=dim, PART=part, ENTRIES=configs.PART_GROUP, BLOCK_S=512,
            BLOCK_D=block_d, BLOCK_REST=block_rest, num_warps=configs.PART_WARPS,
        )  # fmt: skip
        hidden_grad_kernel[(tokens, columns)](
            grad, factor, weight, cu_seqlens, starts, ends, owners, order, partials, d_hidden,
            batch, vocab, tokens, first, last, parts_per_text, *grad.stride(), weight.stride(0),
            D=dim, PART=part, ENTRIES=configs.ENTRIES, BLOCK_D=block_d, BLOCK_REST=block_rest, num_warps=1,
        )  # fmt: skip
