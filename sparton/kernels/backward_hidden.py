"""The gradient by hidden: a stable counting sort of each text's active words by row, then balanced sums."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparton.kernels import configs
from sparton.kernels.entries import load_active, load_entries, store_columns, sum_rows


@triton.jit
def _histogram(words_ptr, positions_ptr, first, n, low, BLOCK: tl.constexpr, BINS: tl.constexpr):
    """How many of BLOCK active words from place ``first`` on each of the rows low .. low + BINS - 1 wins."""
    offs_e = first + tl.arange(0, BLOCK)
    mask = offs_e < n
    word = tl.load(words_ptr + offs_e, mask=mask, other=0).to(tl.int32)
    position = tl.load(positions_ptr + word, mask=mask, other=0).to(tl.int32) - low
    return tl.histogram(position, BINS, mask=mask & (position >= 0) & (position < BINS))


@triton.jit(do_not_specialize=["R", "first_b", "chunk_words", "num_chunks", "stride_gb"])
def histogram_kernel(
    grad_ptr,
    factor_ptr,
    positions_ptr,
    cu_seqlens_ptr,
    words_ptr,
    counts_ptr,
    table_ptr,
    V,
    R,
    first_b,
    chunk_words,
    num_chunks,
    stride_gb,
    BLOCK_V: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_FEW: tl.constexpr,
    BINS: tl.constexpr,
):
    """One program: a chunk of one text's words. Lists the active ones and counts how many each row of the text wins.

    ``words``: places within the chunk, ascending; ``counts``: how many; ``table[chunk, row]``: won by that row.
    """
    text = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    b = first_b + text
    begin = chunk * chunk_words
    words_ptr += text * V + begin
    grad_ptr += b * stride_gb + begin
    factor_ptr += b * V + begin
    n = 0
    for first in range(0, tl.minimum(chunk_words, V - begin), BLOCK_V):
        offs_c = first + tl.arange(0, BLOCK_V)
        _, active = load_active(grad_ptr + offs_c, factor_ptr + offs_c, begin + offs_c < V)
        one = active.to(tl.int32)
        tl.store(words_ptr + n + tl.cumsum(one, axis=0) - one, offs_c.to(tl.int16), mask=active)
        n += tl.sum(one, axis=0)
    tl.store(counts_ptr + text * num_chunks + chunk, n)
    tl.debug_barrier()  # the list is read by other threads than wrote it

    start = tl.load(cu_seqlens_ptr + b).to(tl.int64)
    length = (tl.load(cu_seqlens_ptr + b + 1).to(tl.int64) - start).to(tl.int32)
    positions_ptr += b * V + begin
    for low in range(0, length, BINS):  # long texts take several passes: a histogram's cost grows with its bins
        won = tl.zeros((BINS,), tl.int32)
        for first in range(0, n, BLOCK_E):
            if n - first > BLOCK_FEW:
                won += _histogram(words_ptr, positions_ptr, first, n, low, BLOCK_E, BINS)
            else:
                won += _histogram(words_ptr, positions_ptr, first, n, low, BLOCK_FEW, BINS)
        offs_s = low + tl.arange(0, BINS)
        tl.store(table_ptr + chunk.to(tl.int64) * R + start + offs_s, won, mask=offs_s < length)


@triton.jit(do_not_specialize=["R", "num_chunks"])
def scan_chunks_kernel(table_ptr, totals_ptr, R, num_chunks, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr):
    """One program: for BLOCK_R rows the table becomes sums over the chunks before; ``totals[row]``: over all."""
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


@triton.jit(do_not_specialize=["first_b"])
def scan_rows_kernel(totals_ptr, starts_ptr, ends_ptr, texts_ptr, cu_seqlens_ptr, first_b, BLOCK_R: tl.constexpr):
    """One program: the rows of one text. Row r of text ``texts[r]`` gets the places ``starts[r] .. ends[r] - 1``."""
    b = first_b + tl.program_id(0)
    start = tl.load(cu_seqlens_ptr + b).to(tl.int64)
    length = (tl.load(cu_seqlens_ptr + b + 1).to(tl.int64) - start).to(tl.int32)
    before = 0
    for low in range(0, length, BLOCK_R):
        offs_s = low + tl.arange(0, BLOCK_R)
        mask = offs_s < length
        total = tl.load(totals_ptr + start + offs_s, mask=mask, other=0)
        end = before + tl.cumsum(total, axis=0)
        tl.store(starts_ptr + start + offs_s, end - total, mask=mask)
        tl.store(ends_ptr + start + offs_s, end, mask=mask)
        tl.store(texts_ptr + start + offs_s, tl.zeros((BLOCK_R,), tl.int32) + b, mask=mask)
        before += tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["R", "first_b", "chunk_words", "num_chunks"])
def place_kernel(
    positions_ptr,
    cu_seqlens_ptr,
    words_ptr,
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
    words_ptr += text * V + begin
    positions_ptr += b * V + begin
    table_ptr += chunk.to(tl.int64) * R + start
    starts_ptr += start
    order_ptr += text * V
    offs = tl.arange(0, BLOCK_E)
    # For entry j: 1 for each entry i before it, 2 * BLOCK_E for each after it.
    weight = (offs[:, None] < offs[None, :]).to(tl.int32) + (offs[:, None] > offs[None, :]).to(tl.int32) * (2 * BLOCK_E)
    next_word = tl.load(words_ptr + offs, mask=offs < n, other=0).to(tl.int32)
    for first in range(0, n, BLOCK_E):
        mask = first + offs < n
        word = next_word
        offs_next = first + BLOCK_E + offs
        next_word = tl.load(words_ptr + offs_next, mask=offs_next < n, other=0).to(tl.int32)
        position = tl.load(positions_ptr + word, mask=mask, other=0).to(tl.int32)
        key = tl.where(mask, position, -1 - offs)  # what is masked shares a row with nobody
        same = tl.sum(tl.where(key[:, None] == key[None, :], weight, 0), axis=0)
        cell = table_ptr + position
        place = tl.load(cell, mask=mask, other=0) + same % (2 * BLOCK_E)
        row_start = tl.load(starts_ptr + position, mask=mask, other=0)
        tl.store(order_ptr + row_start + place, begin + word, mask=mask)
        # The last entry of a row counts on for all, after all have read the cell and before they read it again.
        tl.debug_barrier()
        tl.store(cell, place + 1, mask=mask & (same < 2 * BLOCK_E))
        tl.debug_barrier()


@triton.jit(do_not_specialize=["B", "R", "first_b", "last_b", "parts_per_text", "num_parts", "stride_gb"])
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
    num_parts,
    stride_gb,
    stride_wv,
    D: tl.constexpr,
    PART: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The first ``num_parts`` programs: a part of a long row each; the others: the gradient of one row that isn't long.

    A row with n >= 2 * PART words is long and has n // PART parts, of PART words each but for the last one, which has
    the rest too. Parts thus begin at least PART places apart, and one at most between two multiples of PART: this
    interval is the program's and the partial sum's number.
    """
    program = tl.program_id(0)
    row = tl.zeros((), tl.int64)
    text = row
    first = 0
    last = 0
    mine = program < 0
    if program < num_parts:
        text = (program // parts_per_text).to(tl.int64)
        place = program % parts_per_text * PART
        begin = tl.load(cu_seqlens_ptr + first_b + text).to(tl.int64)
        length = (tl.load(cu_seqlens_ptr + first_b + text + 1).to(tl.int64) - begin).to(tl.int32)
        if place < tl.load(ends_ptr + begin + length - 1, mask=length > 0, other=0):
            for low in range(0, length, BLOCK_S):
                offs_s = low + tl.arange(0, BLOCK_S)
                start = tl.load(starts_ptr + begin + offs_s, mask=offs_s < length, other=0)
                end = tl.load(ends_ptr + begin + offs_s, mask=offs_s < length, other=0)
                parts = (end - start) // PART
                part = tl.cdiv(tl.maximum(place - start, 0), PART)
                part_start = start + part * PART
                chosen = (parts >= 2) & (part < parts) & (part_start < place + PART)
                first += tl.sum(tl.where(chosen, part_start, 0), axis=0)
                last += tl.sum(tl.where(chosen, tl.where(part == parts - 1, end, part_start + PART), 0), axis=0)
            mine = last > first
    else:
        row = (program - num_parts).to(tl.int64)
        # Rows past the last text get their zeros with the last range of texts.
        stop = tl.load(cu_seqlens_ptr + last_b, mask=last_b < B, other=R).to(tl.int64)
        if (row >= tl.load(cu_seqlens_ptr + first_b).to(tl.int64)) & (row < stop):
            owned = row < tl.load(cu_seqlens_ptr + B).to(tl.int64)
            text = tl.load(texts_ptr + row, mask=owned, other=first_b).to(tl.int64) - first_b
            first = tl.load(starts_ptr + row, mask=owned, other=0)
            last = tl.load(ends_ptr + row, mask=owned, other=0)
            mine = last - first < 2 * PART
    if mine:
        order_ptr += text * V
        grad_ptr += (first_b + text) * stride_gb
        factor_ptr += (first_b + text) * V
        entries = load_entries(order_ptr, first, last, ENTRIES)
        total = sum_rows(
            entries, order_ptr, first, last, grad_ptr, factor_ptr, weight_ptr, stride_wv, D, ENTRIES, BLOCK_D
        )
        if program < num_parts:
            store_columns(partials_ptr + program.to(tl.int64) * D, total, D, BLOCK_D)
        else:
            store_columns(grad_hidden_ptr + row * D, total, D, BLOCK_D)


@triton.jit(do_not_specialize=["first_b", "last_b", "parts_per_text"])
def long_rows_kernel(
    cu_seqlens_ptr,
    starts_ptr,
    ends_ptr,
    texts_ptr,
    partials_ptr,
    grad_hidden_ptr,
    first_b,
    last_b,
    parts_per_text,
    D: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: the gradients of the long ones among BLOCK_R rows, from their partial sums in their order."""
    begin = tl.load(cu_seqlens_ptr + first_b).to(tl.int64) + tl.program_id(0).to(tl.int64) * BLOCK_R
    end = tl.minimum(begin + BLOCK_R, tl.load(cu_seqlens_ptr + last_b).to(tl.int64))
    offs_r = begin + tl.arange(0, BLOCK_R)
    start = tl.load(starts_ptr + offs_r, mask=offs_r < end, other=0)
    stop = tl.load(ends_ptr + offs_r, mask=offs_r < end, other=0)
    if tl.max(stop - start, axis=0) >= 2 * PART:
        offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        for row in range(begin, end):
            first = tl.load(starts_ptr + row)
            parts = (tl.load(ends_ptr + row) - first) // PART
            if parts >= 2:
                slot = (tl.load(texts_ptr + row).to(tl.int64) - first_b) * parts_per_text + first // PART
                total = tl.zeros((BLOCK_D,), tl.float32)
                for part in range(0, parts):
                    total += tl.load(partials_ptr + (slot + part) * D + offs_d, mask=offs_d < D, other=0.0)
                store_columns(grad_hidden_ptr + row * D, total, D, BLOCK_D)


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
    order, words = (torch.empty(texts * vocab, dtype=dtype, device=device) for dtype in (torch.int32, torch.int16))
    counts, table, totals, starts, ends, owners = (
        torch.empty(size, dtype=torch.int32, device=device)
        for size in (texts * chunks, chunks * tokens, *4 * (tokens,))
    )
    histogram_kernel[(texts, chunks)](
        grad, factor, positions, cu_seqlens, words, counts, table, vocab, tokens, first, chunk_words, chunks,
        grad.stride(0), BLOCK_V=configs.LEAST_CHUNK_WORDS, BLOCK_E=512, BLOCK_FEW=64,
        BINS=256 if positions.itemsize == 1 else 512, num_warps=4,
    )  # fmt: skip
    scan_chunks_kernel[(triton.cdiv(tokens, 32),)](table, totals, tokens, chunks, BLOCK_C=128, BLOCK_R=32, num_warps=4)
    scan_rows_kernel[(texts,)](totals, starts, ends, owners, cu_seqlens, first, BLOCK_R=512, num_warps=4)
    place_kernel[(texts, chunks)](
        positions, cu_seqlens, words, counts, table, starts, order, vocab, tokens, first, chunk_words, chunks,
        BLOCK_E=32, num_warps=1,
    )  # fmt: skip
    return order, starts, ends, owners


def hidden_gradient(
    grad: Tensor, factor: Tensor, positions: Tensor, weight: Tensor, cu_seqlens: Tensor, d_hidden: Tensor
) -> None:
    """Fills the gradient by hidden, (N, D).

    The order and the list of a text's active words have room for all words, its partial sums for all parts; texts are
    taken in ranges for which this fits ``configs.WORKSPACE`` bytes. The lists are gone when the partial sums come.
    """
    (batch, vocab), (tokens, dim) = factor.shape, d_hidden.shape
    part = configs.PART_ENTRIES
    parts_per_text = triton.cdiv(vocab, part)
    fits = max(1, configs.WORKSPACE // (4 * vocab + max(2 * vocab, 4 * parts_per_text * dim)))
    step = triton.cdiv(batch, triton.cdiv(batch, fits))
    block_d = configs.gradient_columns(dim)
    columns = triton.cdiv(dim, block_d)
    cut = {"D": dim, "PART": part, "BLOCK_D": block_d, "num_warps": 1}
    for first in range(0, batch, step):
        last = min(first + step, batch)
        order, starts, ends, owners = _sort(grad, factor, positions, cu_seqlens, first, last - first, tokens)
        parts = (last - first) * parts_per_text
        partials = torch.empty(parts, dim, dtype=torch.float32, device=grad.device)
        # Parts first: the longest.
        hidden_grad_kernel[(parts + tokens, columns)](
            grad, factor, weight, cu_seqlens, starts, ends, owners, order, partials, d_hidden,
            batch, vocab, tokens, first, last, parts_per_text, parts, grad.stride(0), weight.stride(0),
            ENTRIES=configs.ENTRIES, BLOCK_S=128, **cut,
        )  # fmt: skip
        long_rows_kernel[(triton.cdiv(tokens, 32), columns)](
            cu_seqlens, starts, ends, owners, partials, d_hidden, first, last, parts_per_text, BLOCK_R=32, **cut
        )
        del order, partials  # before the next range has its own
