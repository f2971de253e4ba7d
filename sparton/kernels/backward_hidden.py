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
def _make_span(first, count):
    """What is summed apart, int64: ``count`` entries from ``first`` on, or nothing at all where ``count`` is -1."""
    return (count.to(tl.int64) << 32) | first.to(tl.int64)


@triton.jit(do_not_specialize=["R", "num_chunks", "first_b", "last_b", "num_parts"])
def scan_chunks_kernel(
    table_ptr,
    totals_ptr,
    sums_ptr,
    spans_ptr,
    cu_seqlens_ptr,
    R,
    num_chunks,
    first_b,
    last_b,
    num_parts,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program: for BLOCK_R rows the table becomes sums over the chunks before; ``totals[row]``: over all.

    ``sums[block]``: over all of its rows. The spans of parts are to be left alone until there are parts.
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
    rows = tl.load(cu_seqlens_ptr + last_b) - tl.load(cu_seqlens_ptr + first_b)
    total = tl.where(offs_r < rows, total, 0)  # nobody counted for those of no text
    tl.store(totals_ptr + offs_r, total, mask=mask_r)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total, axis=0), mask=tl.program_id(0) * BLOCK_R < R)
    tl.store(spans_ptr + offs_r, tl.full((BLOCK_R,), -1, tl.int64), mask=offs_r < num_parts)


@triton.jit(do_not_specialize=["B", "R", "launched", "first_b", "last_b", "num_parts"])
def scan_rows_kernel(
    totals_ptr,
    sums_ptr,
    firsts_ptr,
    spans_ptr,
    rows_ptr,
    cu_seqlens_ptr,
    B,
    R,
    launched,
    first_b,
    last_b,
    num_parts,
    PART: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One program: the spans of BLOCK_R rows, and of the parts of the long ones among them.

    ``firsts[row]``: where the row's entries begin; ``rows[slot]``: the row of the span after those of all parts.
    A row with n >= 2 * PART words is long and has n // PART parts, of PART words each but for the last one, which has
    the rest too; its own span is left alone. Parts begin at least PART places apart, at most one between two multiples
    of PART, whose number is the part's.

    Of SEGMENT rows each, those that win most have the first slots, then those that come second, and so on: spans that
    are summed at a time have about as many words, so they stand at about the same word all the time, whose row of the
    weight stays in the L2.
    """
    block = tl.program_id(0)
    blocks = tl.minimum(block, tl.cdiv(R, BLOCK_R))
    before = 0
    for first_block in range(0, blocks, BLOCK_S):
        offs = first_block + tl.arange(0, BLOCK_S)
        before += tl.sum(tl.load(sums_ptr + offs, mask=offs < blocks, other=0), axis=0)
    offs_r = block * BLOCK_R + tl.arange(0, BLOCK_R)
    total = tl.load(totals_ptr + offs_r, mask=offs_r < R, other=0)
    first = before + tl.cumsum(total, axis=0) - total
    tl.store(firsts_ptr + offs_r, first, mask=offs_r < R)

    parts = total // PART
    whole = tl.where(parts >= 2, 0, total)
    segment = block * BLOCK_R // SEGMENT
    offs_o = segment * SEGMENT + tl.arange(0, SEGMENT)
    other = tl.load(totals_ptr + offs_o, mask=offs_o < R, other=0)
    other = tl.where(other // PART >= 2, 0, other)
    other = tl.where(offs_o < launched, other, -1)[:, None]
    is_before = (other > whole[None, :]) | ((other == whole[None, :]) & (offs_o[:, None] < offs_r[None, :]))
    rank = tl.sum(is_before.to(tl.int32), axis=0)
    segments = tl.cdiv(launched, SEGMENT)
    rest = launched - (segments - 1) * SEGMENT  # rows of the last one
    slot = rank * segments + segment - tl.maximum(rank - rest, 0)

    # The launched rows may go on to those of the next range; with the last one they go on to the end of hidden, and
    # those past the last text get their zeros.
    row = tl.load(cu_seqlens_ptr + first_b) + offs_r
    spare = (last_b == B) & (row < launched)
    count = tl.where(parts >= 2, -1, total)
    count = tl.where((row < tl.load(cu_seqlens_ptr + last_b)) | spare, count, -1)
    mask = offs_r < launched
    tl.store(spans_ptr + num_parts + slot, _make_span(first, count), mask=mask)
    tl.store(rows_ptr + slot, offs_r, mask=mask)
    most = tl.max(parts, axis=0)
    if most >= 2:
        for part in range(0, most):
            begin = first + part * PART
            count = tl.where(part == parts - 1, total - part * PART, PART)
            tl.store(spans_ptr + begin // PART, _make_span(begin, count), mask=(parts >= 2) & (part < parts))


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


@triton.jit(do_not_specialize=["R", "first_b"])
def long_rows_kernel(
    totals_ptr,
    firsts_ptr,
    cu_seqlens_ptr,
    partials_ptr,
    grad_hidden_ptr,
    R,
    first_b,
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
                number = (first // PART).to(tl.int64)
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
    chunks, parts = triton.cdiv(vocab, chunk_words), triton.cdiv(texts * vocab, configs.PART_ENTRIES)
    order, words = (torch.empty(texts * vocab, dtype=dtype, device=device) for dtype in (torch.int64, torch.int16))
    spans = torch.empty(parts + launched, dtype=torch.int64, device=device)
    # In multiples of 16 bytes, as the alignment of a pointer is compiled in.
    sizes = (texts * chunks, chunks * rows, rows, triton.cdiv(rows, 32), rows, launched)
    sizes = [-(-size // 4) * 4 for size in sizes]
    counts, table, totals, sums, firsts, row_of = torch.empty(sum(sizes), dtype=torch.int32, device=device).split(sizes)
    histogram_kernel[(chunks, texts)](
        grad, factor, positions, cu_seqlens, words, counts, table, vocab, rows, first, chunk_words, chunks,
        grad.stride(0), BLOCK_I=configs.LEAST_CHUNK_WORDS // 64, BLOCK_J=64, BLOCK_E=256, BLOCK_FEW=64,
        BINS=256 if positions.itemsize == 1 else 512, num_warps=1,
    )  # fmt: skip
    scan_chunks_kernel[(triton.cdiv(max(rows, parts), 32),)](
        table, totals, sums, spans, cu_seqlens, rows, chunks, first, last, parts, BLOCK_C=128, BLOCK_R=32, num_warps=4,
    )  # fmt: skip
    scan_rows_kernel[(triton.cdiv(launched, 32),)](
        totals, sums, firsts, spans, row_of, cu_seqlens, batch, rows, launched, first, last, parts,
        PART=configs.PART_ENTRIES, SEGMENT=configs.SEGMENT, BLOCK_R=32, BLOCK_S=1024, num_warps=4,
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
    fits = min(fits, 2**16 - 1)  # programs on a grid's second axis
    step = triton.cdiv(batch, triton.cdiv(batch, fits))
    block_d = configs.hidden_columns(dim)
    columns = triton.cdiv(dim, block_d)
    for first in range(0, batch, step):
        last = min(first + step, batch)
        rows = min(tokens, (last - first) * max_seqlen)
        launched = tokens if last == batch else rows
        found = _sort(grad, factor, positions, cu_seqlens, first, last, rows, launched)
        partials = torch.empty(found.num_parts, dim, dtype=torch.float32, device=grad.device)
        # Parts first: the longest.
        hidden_grad_kernel[(found.num_parts + launched, columns)](
            weight, found.order, found.spans, found.rows, cu_seqlens, partials, d_hidden, first, found.num_parts,
            STRIDE=weight.stride(0), D=dim, FEW_ENTRIES=configs.FEW_ENTRIES, BLOCK_D=block_d, PAIRS=in_pairs(weight),
            num_warps=1,
        )  # fmt: skip
        long_rows_kernel[(triton.cdiv(rows, 32), columns)](
            found.totals, found.firsts, cu_seqlens, partials, d_hidden, rows, first,
            D=dim, PART=configs.PART_ENTRIES, BLOCK_R=32, BLOCK_D=block_d, num_warps=1,
        )  # fmt: skip
        del found, partials  # before the next range has its own
