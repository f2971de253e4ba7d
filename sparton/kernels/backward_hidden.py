"""The gradient by hidden: a stable counting sort of each text's active words by row, then balanced sums."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparton.kernels import configs
from sparton.kernels.entries import in_pairs, load_active, load_pair, make_entry, store_columns, sum_rows
from sparton.kernels.forward import INTERPRETED


@triton.jit
def _places(active, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr):
    """Places of the active ones of (BLOCK_J, BLOCK_I) words, which count down the columns, and how many there are.

    Four columns are counted in one integer, eight bits each: a column has at most 64 words.
    """
    shifts = tl.arange(0, 4) * 8
    one = tl.reshape(active.to(tl.int32), (BLOCK_J, BLOCK_I // 4, 4))
    packed = tl.sum(one << shifts[None, :][None, :, :], axis=2)
    before = tl.cumsum(packed, axis=0) - packed
    before = tl.reshape((before[:, :, None] >> shifts[None, :][None, :, :]) & 255, (BLOCK_J, BLOCK_I))
    column = tl.reshape((tl.sum(packed, axis=0)[:, None] >> shifts[None, :]) & 255, (BLOCK_I,))
    return (tl.cumsum(column, axis=0) - column)[None, :] + before, tl.sum(column, axis=0)


@triton.jit
def _rows_of(cu_seqlens_ptr, b, first_b):
    """First row of text b, counted from that of text ``first_b``, and how many it has."""
    first = tl.load(cu_seqlens_ptr + b)
    start = (first - tl.load(cu_seqlens_ptr + first_b)).to(tl.int32)
    return start, (tl.load(cu_seqlens_ptr + b + 1) - first).to(tl.int32)


@triton.jit
def _ranks(key, BLOCK: tl.constexpr, MATCH: tl.constexpr):
    """For each of BLOCK keys how many equal ones stand before it, and whether it is the last of them.

    With MATCH, on NVIDIA, by what the lanes of a warp tell each other: 32 keys, a warp, a key a lane.
    """
    if MATCH:
        rank, later = tl.inline_asm_elementwise(
            """{
            .reg .b32 equal, lanes;
            match.any.sync.b32 equal, $2, 0xffffffff;
            mov.u32 lanes, %lanemask_lt;
            and.b32 lanes, lanes, equal;
            popc.b32 $0, lanes;
            mov.u32 lanes, %lanemask_gt;
            and.b32 $1, lanes, equal;
            }""",
            "=r,=r,r", [key], dtype=(tl.int32, tl.int32), is_pure=False, pack=1,
        )  # fmt: skip
        last = later == 0
    else:
        offs = tl.arange(0, BLOCK)
        # For key j: 1 for each equal key before it, 2 * BLOCK for each after it.
        weight = (offs[:, None] < offs[None, :]).to(tl.int32)
        weight += (offs[:, None] > offs[None, :]).to(tl.int32) * (2 * BLOCK)
        equal = tl.sum(tl.where(key[:, None] == key[None, :], weight, 0), axis=0)
        rank = equal % (2 * BLOCK)
        last = equal < 2 * BLOCK
    return rank, last


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
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_FEW: tl.constexpr,
    BINS: tl.constexpr,
):
    """One program: a chunk of one text's words. Lists the active ones and counts how many each row of the text wins.

    ``words``: places within the chunk, ascending; ``counts``: how many; ``table[chunk, row]``: won by that row.
    Here and below rows are counted from the first one of the range's texts, which have R at most.
    """
    text = tl.program_id(1).to(tl.int64)
    chunk = tl.program_id(0)
    b = first_b + text
    begin = chunk * chunk_words
    words_ptr += text * V + begin
    grad_ptr += b * stride_gb + begin
    factor_ptr += b * V + begin
    positions_ptr += b * V + begin
    tile = tl.arange(0, BLOCK_J)[:, None] + tl.arange(0, BLOCK_I)[None, :] * BLOCK_J
    n = 0
    for first in range(0, tl.minimum(chunk_words, V - begin), BLOCK_I * BLOCK_J):
        offs_c = first + tile
        _, active = load_active(grad_ptr + offs_c, factor_ptr + offs_c, begin + offs_c < V)
        place, count = _places(active, BLOCK_I, BLOCK_J)
        tl.store(words_ptr + n + place, offs_c.to(tl.int16), mask=active)
        n += count
    tl.store(counts_ptr + text * num_chunks + chunk, n)
    tl.debug_barrier()  # the list is read by other threads than wrote it

    table_ptr += chunk.to(tl.int64) * R
    start, length = _rows_of(cu_seqlens_ptr, b, first_b)
    for low in range(0, length, BINS):  # long texts take several passes: a histogram's cost grows with its bins
        won = tl.zeros((BINS,), tl.int32)
        for first in range(0, n, BLOCK_E):
            if n - first > BLOCK_FEW:
                won += _histogram(words_ptr, positions_ptr, first, n, low, BLOCK_E, BINS)
            else:
                won += _histogram(words_ptr, positions_ptr, first, n, low, BLOCK_FEW, BINS)
        offs_s = low + tl.arange(0, BINS)
        tl.store(table_ptr + start + offs_s, won, mask=offs_s < tl.minimum(length, R - start))


@triton.jit
def _order_of_rows(row, cu_seqlens_ptr, first_b, last_b, R, SEGMENT: tl.constexpr, BLOCK_B: tl.constexpr):
    """Where rows stand in their segments, and where in the order of the first rows of all segments, the second ones ...

    A text's segments have SEGMENT rows each, but for its last one, which may have fewer.
    """
    base = tl.load(cu_seqlens_ptr + first_b)
    start = tl.zeros(row.shape, tl.int32)
    for begin in range(first_b, last_b, BLOCK_B):
        offs_b = begin + tl.arange(0, BLOCK_B)
        first = (tl.load(cu_seqlens_ptr + offs_b, mask=offs_b < last_b, other=base) - base).to(tl.int32)
        start = tl.maximum(start, tl.max(tl.where(first[:, None] <= row[None, :], first[:, None], 0), axis=0))
    place = (row - start) % SEGMENT
    slot = (row - start) // SEGMENT
    for begin in range(first_b, last_b, BLOCK_B):
        offs_b = begin + tl.arange(0, BLOCK_B)
        first = (tl.load(cu_seqlens_ptr + offs_b, mask=offs_b < last_b, other=base) - base).to(tl.int32)
        last = (tl.load(cu_seqlens_ptr + offs_b + 1, mask=offs_b < last_b, other=base) - base).to(tl.int32)
        length = tl.maximum(tl.minimum(last, R) - first, 0)
        whole, rest = (length // SEGMENT)[:, None], (length % SEGMENT)[:, None]
        slot += tl.sum(whole * place[None, :] + tl.minimum(rest, place[None, :]), axis=0)
        as_long = whole + (rest > place[None, :]).to(tl.int32)
        slot += tl.sum(tl.where(last[:, None] <= row[None, :], as_long, 0), axis=0)
    return place, slot


@triton.jit
def _make_span(first, count):
    """What is summed apart, int64: ``count`` entries from ``first`` on, or nothing at all where ``count`` is -1."""
    return (count.to(tl.int64) << 32) | first.to(tl.int64)


@triton.jit(do_not_specialize=["B", "R", "launched", "num_chunks", "first_b", "last_b", "num_parts"])
def scan_chunks_kernel(
    table_ptr,
    totals_ptr,
    keys_ptr,
    slots_ptr,
    spans_ptr,
    rows_ptr,
    cu_seqlens_ptr,
    B,
    R,
    launched,
    num_chunks,
    first_b,
    last_b,
    num_parts,
    PART: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program: for BLOCK_R rows the table becomes sums over the chunks before; ``totals[row]``: over all.

    ``keys[row]``: larger than those of the segment's other rows of which less is summed whole, or as much further down;
    ``slots[row]``: the slot of the row that is as far down by keys as ``row`` is by itself.
    Until :func:`scan_rows_kernel` knows better, all parts and each of the launched rows are to be left alone; with the
    last range they go on to the end of hidden, and those past the last text get their zeros.
    """
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    total = tl.zeros((BLOCK_R,), tl.int32)
    for first in range(0, num_chunks, BLOCK_C):
        offs_c = first + tl.arange(0, BLOCK_C)
        cell = table_ptr + offs_c.to(tl.int64)[:, None] * R + offs_r[None, :]
        mask = (offs_c < num_chunks)[:, None] & mask_r[None, :]
        won = tl.load(cell, mask=mask, other=0)
        tl.store(cell, total[None, :] + tl.cumsum(won, axis=0) - won, mask=mask)
        total += tl.sum(won, axis=0)
    row = tl.load(cu_seqlens_ptr + first_b) + offs_r
    total = tl.where(row < tl.load(cu_seqlens_ptr + last_b), total, 0)  # of no text: nobody counted
    place, slot = _order_of_rows(offs_r, cu_seqlens_ptr, first_b, last_b, R, SEGMENT, 32)
    key = tl.where(total >= 2 * PART, 0, total) * SEGMENT + (SEGMENT - 1 - place)
    tl.store(totals_ptr + offs_r, total, mask=mask_r)
    tl.store(keys_ptr + offs_r, key, mask=mask_r)
    tl.store(slots_ptr + offs_r, slot, mask=mask_r)
    none = tl.full((BLOCK_R,), -1, tl.int64)
    spare = (row >= tl.load(cu_seqlens_ptr + B)) & (row < launched) & (last_b == B)
    tl.store(spans_ptr + offs_r, none, mask=offs_r < num_parts)
    tl.store(spans_ptr + num_parts + offs_r, tl.where(spare, 0, none), mask=offs_r < launched)
    tl.store(rows_ptr + offs_r, offs_r, mask=offs_r < launched)


@triton.jit(do_not_specialize=["R", "first_b", "parts_per_text", "num_parts"])
def scan_rows_kernel(
    totals_ptr,
    keys_ptr,
    slots_ptr,
    firsts_ptr,
    spans_ptr,
    rows_ptr,
    cu_seqlens_ptr,
    V,
    R,
    first_b,
    parts_per_text,
    num_parts,
    PART: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """One program: the spans of some of the rows of one text, and of the parts of the long ones among them.

    ``firsts[row]``: where the row's entries begin; ``rows[slot]``: the row of the span after those of all parts.
    A row with n >= 2 * PART words is long and has n // PART parts, of PART words each but for the last one, which has
    the rest too; its own span is left alone. Parts begin at least PART places apart, at most one between two multiples
    of PART, whose number is the part's.

    The rows that win most of a segment take its first slots: spans that are summed at a time have about as many words,
    so they stand at about the same word all the time, whose row of the weight stays in the L2.
    """
    text = tl.program_id(0)
    start, length = _rows_of(cu_seqlens_ptr, first_b + text, first_b)
    length = tl.minimum(length, R - start)
    totals_ptr += start
    keys_ptr += start
    for low in range(tl.program_id(1) * BLOCK_R, length, tl.num_programs(1) * BLOCK_R):
        offs_s = low + tl.arange(0, BLOCK_R)
        mask = offs_s < length
        total = tl.load(totals_ptr + offs_s, mask=mask, other=0)
        key = tl.load(keys_ptr + offs_s, mask=mask, other=0)
        segment = low // SEGMENT * SEGMENT
        before = 0
        for other in range(0, segment, SEGMENT):
            before += tl.sum(tl.load(totals_ptr + other + tl.arange(0, SEGMENT)), axis=0)
        first = tl.zeros((BLOCK_R,), tl.int32) + before
        rank = tl.zeros((BLOCK_R,), tl.int32)
        for other in range(segment, tl.minimum(segment + SEGMENT, length), BLOCK_O):
            offs_o = other + tl.arange(0, BLOCK_O)
            other_total = tl.load(totals_ptr + offs_o, mask=offs_o < length, other=0)[:, None]
            other_key = tl.load(keys_ptr + offs_o, mask=offs_o < length, other=-1)[:, None]
            first += tl.sum(tl.where(offs_o[:, None] < offs_s[None, :], other_total, 0), axis=0)
            rank += tl.sum((other_key > key[None, :]).to(tl.int32), axis=0)
        first += text * V
        parts = total // PART
        tl.store(firsts_ptr + start + offs_s, first, mask=mask)
        slot = tl.load(slots_ptr + start + segment + rank, mask=mask, other=0)
        tl.store(spans_ptr + num_parts + slot, _make_span(first, tl.where(parts >= 2, -1, total)), mask=mask)
        tl.store(rows_ptr + slot, start + offs_s, mask=mask)
        most = tl.max(parts, axis=0)
        if most >= 2:
            for part in range(0, most):
                begin = first + part * PART
                count = tl.where(part == parts - 1, total - part * PART, PART)
                number = text * parts_per_text + (begin - text * V) // PART
                chosen = (parts >= 2) & (part < parts)
                tl.store(spans_ptr + number, _make_span(begin, count), mask=chosen)


@triton.jit(do_not_specialize=["R", "first_b", "chunk_words", "num_chunks", "stride_gb"])
def place_kernel(
    grad_ptr,
    factor_ptr,
    positions_ptr,
    cu_seqlens_ptr,
    words_ptr,
    counts_ptr,
    table_ptr,
    firsts_ptr,
    order_ptr,
    V,
    R,
    first_b,
    chunk_words,
    num_chunks,
    stride_gb,
    BLOCK_E: tl.constexpr,
    MATCH: tl.constexpr,
):
    """One program: writes the active words of one chunk of one text to their places in the order by row.

    Within a row words stay ascending, so sums have one order and rows that are summed at a time read neighbouring
    words. Nobody else touches the program's cells of the table.
    """
    text = tl.program_id(1).to(tl.int64)
    chunk = tl.program_id(0)
    b = first_b + text
    start, length = _rows_of(cu_seqlens_ptr, b, first_b)
    length = tl.minimum(length, R - start)  # what a bound below the lengths leaves out is nobody else's
    begin = chunk * chunk_words
    n = tl.load(counts_ptr + text * num_chunks + chunk)
    words_ptr += text * V + begin
    positions_ptr += b * V + begin
    grad_ptr += b * stride_gb + begin
    factor_ptr += b * V + begin
    table_ptr += chunk.to(tl.int64) * R + start
    firsts_ptr += start
    offs = tl.arange(0, BLOCK_E)
    # Words are loaded two steps ahead and positions one: what is left to wait for is the table.
    word = tl.load(words_ptr + offs, mask=offs < n, other=0).to(tl.int32)
    position = tl.load(positions_ptr + word, mask=offs < n, other=0).to(tl.int32)
    next_word = tl.load(words_ptr + BLOCK_E + offs, mask=BLOCK_E + offs < n, other=0).to(tl.int32)
    for first in range(0, n, BLOCK_E):
        mask = (first + offs < n) & (position < length)
        next_position = tl.load(positions_ptr + next_word, mask=first + BLOCK_E + offs < n, other=0).to(tl.int32)
        offs_later = first + 2 * BLOCK_E + offs
        later_word = tl.load(words_ptr + offs_later, mask=offs_later < n, other=0).to(tl.int32)
        cell = table_ptr + position
        place = tl.load(cell, mask=mask, other=0)
        row_start = tl.load(firsts_ptr + position, mask=mask, other=0)
        g, _ = load_active(grad_ptr + word, factor_ptr + word, mask)
        key = tl.where(mask, position, -1 - offs)  # what is masked shares a row with nobody
        rank, is_last = _ranks(key, BLOCK_E, MATCH)
        place += rank
        tl.store(order_ptr + row_start + place, make_entry(g, begin + word), mask=mask)
        # The last entry of a row counts on for all, after all have read the cell and before they read it again.
        tl.debug_barrier()
        tl.store(cell, place + 1, mask=mask & is_last)
        tl.debug_barrier()
        word = next_word
        position = next_position
        next_word = later_word


@triton.jit(do_not_specialize=["first_b", "num_parts"])
def hidden_grad_kernel(
    weight_ptr,
    order_ptr,
    spans_ptr,
    rows_ptr,
    cu_seqlens_ptr,
    partials_ptr,
    grad_hidden_ptr,
    first_b,
    num_parts,
    STRIDE: tl.constexpr,
    D: tl.constexpr,
    FEW_ENTRIES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """One program: its share of the columns of the sum over one span, of a part or a row, block by block.

    The program for the first columns of a span with few entries does them all.
    """
    span = tl.program_id(0)
    base = tl.load(cu_seqlens_ptr + first_b).to(tl.int64)
    place = tl.load(spans_ptr + span)
    row = tl.load(rows_ptr + span - num_parts, mask=span >= num_parts, other=0)
    first, count = place.to(tl.int32), (place >> 32).to(tl.int32)
    last = first + count
    column = tl.program_id(1)
    columns = column + 1
    if count <= FEW_ENTRIES:
        columns = tl.where(column == 0, tl.num_programs(1), 0)
    if count >= 0:
        pair = load_pair(order_ptr, 1, first, last)
        for block in range(column, columns):
            total = sum_rows(pair, order_ptr, 1, first, last, weight_ptr, block, STRIDE, D, BLOCK_D, PAIRS)
            if span < num_parts:
                store_columns(partials_ptr + span.to(tl.int64) * D, total, block, D, BLOCK_D)
            else:
                store_columns(grad_hidden_ptr + (base + row) * D, total, block, D, BLOCK_D)


@triton.jit(do_not_specialize=["R", "first_b", "parts_per_text"])
def long_rows_kernel(
    totals_ptr,
    firsts_ptr,
    cu_seqlens_ptr,
    partials_ptr,
    grad_hidden_ptr,
    V,
    R,
    first_b,
    parts_per_text,
    D: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: the gradients of the long ones among BLOCK_R rows, from their partial sums in their order."""
    begin = tl.program_id(0).to(tl.int64) * BLOCK_R
    offs_r = begin + tl.arange(0, BLOCK_R)
    if tl.max(tl.load(totals_ptr + offs_r, mask=offs_r < R, other=0), axis=0) >= 2 * PART:
        offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        grad_hidden_ptr += tl.load(cu_seqlens_ptr + first_b).to(tl.int64) * D
        for row in range(begin, tl.minimum(begin + BLOCK_R, R)):
            parts = tl.load(totals_ptr + row) // PART
            if parts >= 2:
                first = tl.load(firsts_ptr + row)
                number = (first // V * parts_per_text + first % V // PART).to(tl.int64)
                total = tl.zeros((BLOCK_D,), tl.float32)
                for part in range(0, parts):
                    total += tl.load(partials_ptr + (number + part) * D + offs_d, mask=offs_d < D, other=0.0)
                store_columns(grad_hidden_ptr + row * D, total, tl.program_id(1), D, BLOCK_D)


@dataclass(frozen=True)
class _Sorted:
    """The active words of some texts, ordered by row, and what is to be summed apart of them.

    Attributes:
        order: (texts * V,) entries, int64.
        firsts: (rows,) where a row's entries begin; totals: (rows,) how many it has.
        spans: (parts + launched,) of parts of long rows, then of rows, as :func:`_make_span` gives them; rows: (launched,)
            the row of each of the latter.
        num_parts: how many spans are for parts.
    """

    order: Tensor
    firsts: Tensor
    totals: Tensor
    spans: Tensor
    rows: Tensor
    num_parts: int


def _sort(
    grad: Tensor,
    factor: Tensor,
    positions: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    first: int,
    last: int,
    rows: int,
    launched: int,
) -> _Sorted:
    """Orders the active words of the texts ``first`` .. ``last - 1``, which have at most ``rows`` rows, by row.

    There are spans for parts of long rows and for ``launched`` rows from these texts' first one on.
    """
    (batch, vocab), device, texts = factor.shape, factor.device, last - first
    chunk_words = configs.chunk_words(vocab, rows)
    chunks, parts_per_text = triton.cdiv(vocab, chunk_words), triton.cdiv(vocab, configs.PART_ENTRIES)
    parts = texts * parts_per_text
    order, words = (torch.empty(texts * vocab, dtype=dtype, device=device) for dtype in (torch.int64, torch.int16))
    spans = torch.empty(parts + launched, dtype=torch.int64, device=device)
    # In multiples of 16 bytes, as the alignment of a pointer is compiled in.
    sizes = [-(-size // 4) * 4 for size in (texts * chunks, chunks * rows, rows, rows, rows, rows, launched)]
    buffer = torch.empty(sum(sizes), dtype=torch.int32, device=device)
    counts, table, totals, keys, slots, firsts, row_of = buffer.split(sizes)
    histogram_kernel[(chunks, texts)](
        grad, factor, positions, cu_seqlens, words, counts, table, vocab, rows, first, chunk_words, chunks,
        grad.stride(0), BLOCK_I=min(configs.HI[0], configs.LEAST_CHUNK_WORDS // 64), BLOCK_J=64, BLOCK_E=configs.HI[2], BLOCK_FEW=64,
        BINS=256 if positions.itemsize == 1 else 512, num_warps=configs.HI[1],
    )  # fmt: skip
    scan_chunks_kernel[(triton.cdiv(max(launched, parts), 32),)](
        table, totals, keys, slots, spans, row_of, cu_seqlens, batch, rows, launched, chunks, first, last, parts,
        PART=configs.PART_ENTRIES, SEGMENT=configs.SEGMENT, BLOCK_C=128, BLOCK_R=32, num_warps=4,
    )  # fmt: skip
    scan_rows_kernel[(texts, triton.cdiv(min(max_seqlen, rows), configs.RO[0]))](
        totals, keys, slots, firsts, spans, row_of, cu_seqlens, vocab, rows, first, parts_per_text, parts,
        PART=configs.PART_ENTRIES, SEGMENT=configs.SEGMENT, BLOCK_R=configs.RO[0], BLOCK_O=configs.RO[1], num_warps=configs.RO[2],
    )  # fmt: skip
    match = grad.is_cuda and torch.version.hip is None and not INTERPRETED
    place_kernel[(chunks, texts)](
        grad, factor, positions, cu_seqlens, words, counts, table, firsts, order, vocab, rows, first, chunk_words,
        chunks, grad.stride(0), BLOCK_E=32, MATCH=match, num_warps=1,
    )  # fmt: skip
    return _Sorted(order, firsts, totals, spans, row_of, parts)


def hidden_gradient(
    grad: Tensor,
    factor: Tensor,
    positions: Tensor,
    weight: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    d_hidden: Tensor,
) -> None:
    """Fills the gradient by hidden, (N, D).

    The order and the list of a text's active words have room for all words, its partial sums for all parts; texts are
    taken in ranges for which this fits ``configs.WORKSPACE`` bytes. The lists are gone when the partial sums come.
    """
    (batch, vocab), (tokens, dim) = factor.shape, d_hidden.shape
    parts_per_text = triton.cdiv(vocab, configs.PART_ENTRIES)
    fits = max(1, configs.WORKSPACE // (8 * vocab + max(2 * vocab, 4 * parts_per_text * dim)))
    step = triton.cdiv(batch, triton.cdiv(batch, fits))
    block_d = configs.hidden_columns(dim)
    columns = triton.cdiv(dim, block_d)
    for first in range(0, batch, step):
        last = min(first + step, batch)
        rows = min(tokens, (last - first) * max_seqlen)
        launched = tokens if last == batch else rows
        found = _sort(grad, factor, positions, cu_seqlens, max_seqlen, first, last, rows, launched)
        partials = torch.empty(found.num_parts, dim, dtype=torch.float32, device=grad.device)
        # Parts first: the longest.
        hidden_grad_kernel[(found.num_parts + launched, columns)](
            weight, found.order, found.spans, found.rows, cu_seqlens, partials, d_hidden,
            first, found.num_parts,
            STRIDE=weight.stride(0), D=dim, FEW_ENTRIES=configs.FEW_ENTRIES, BLOCK_D=block_d, PAIRS=in_pairs(weight), num_warps=1,
        )  # fmt: skip
        long_rows_kernel[(triton.cdiv(rows, 32), columns)](
            found.totals, found.firsts, cu_seqlens, partials, d_hidden, vocab, rows, first, parts_per_text,
            D=dim, PART=configs.PART_ENTRIES, BLOCK_R=32, BLOCK_D=block_d, num_warps=1,
        )  # fmt: skip
        del found, partials  # before the next range has its own
