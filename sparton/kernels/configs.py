"""Tile sizes of the Triton kernels and how the forward's work is laid out: one line per dtype and shape class."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ForwardPlan:
    """How the forward product is cut.

    Attributes:
        block_v, block_s, block_d: a tile, words by rows by columns of a step.
        num_warps, num_stages: warps and depth of the pipeline.
        group: rows of a slot come in multiples of this.
        short: every text has one slot of ``group`` rows; a tile's texts are written at once.
        rows: upper bound of the slots' rows, from shapes.
        chunk: texts that a program goes through for one tile of words.
    """

    block_v: int
    block_s: int
    block_d: int
    num_warps: int
    num_stages: int
    group: int
    short: bool
    rows: int
    chunk: int


# Rows that all programs go through before the words start over: what the L2 serves beside the weight.
CHUNK_ROWS = 16384
# Rows of a slot at least: two of the eight rows that a tensor core takes at a time.
SMALLEST_GROUP = 16
# Largest tile (words, rows, columns of a step) with its warps and stages, by what multiplies. Fused multiply-adds have
# fewer registers to spare; without bulk copies, addresses take them.
TILES = {
    "tensor cores, bulk copies": (128, 256, 64, 8, 3),
    "tensor cores": (128, 128, 64, 8, 3),
    "tf32": (128, 128, 32, 8, 3),
    "fused multiply-add": (64, 64, 32, 8, 2),
}


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def forward_plan(
    kind: str, batch: int, tokens: int, max_seqlen: int, vocab: int, dim: int, programs: int
) -> ForwardPlan:
    """Plans the forward product from what the host knows.

    Args:
        kind: key of TILES.
        batch: B >= 1; tokens: N, an upper bound; max_seqlen: upper bound of the lengths; vocab: V; dim: D.
        programs: that run at a time.
    """
    block_v, widest, block_d, num_warps, num_stages = TILES[kind]
    single = max(power_of_two(max_seqlen), SMALLEST_GROUP)
    # One slot for each text pays where little of it is repeated rows; up to 32 rows it always does.
    short = single <= widest and (single <= 32 or batch * single <= 1.25 * tokens)
    if short:
        group = single
    else:
        # Full texts fill whole tiles; guessed from shapes, and a wrong guess costs time only.
        full = tokens == batch * max_seqlen and max_seqlen % widest == 0
        group = widest if full else SMALLEST_GROUP
    rows = min(tokens + batch * group, batch * math.ceil(max(max_seqlen, 1) / group) * group)
    block_s = min(widest, power_of_two(rows))
    return ForwardPlan(
        block_v=block_v,
        block_s=block_s,
        block_d=min(max(power_of_two(dim), 16), block_d),
        num_warps=num_warps if block_s >= 64 else 4,
        num_stages=num_stages,
        group=group,
        short=short,
        rows=rows,
        chunk=_chunk(batch, rows, math.ceil(vocab / block_v), block_s // group if short else 1, programs),
    )


def _chunk(batch: int, rows: int, tiles_v: int, step: int, programs: int) -> int:
    """Texts in a chunk: of CHUNK_ROWS rows, or fewer where that saves 3% of the programs' time from a wave half empty."""
    best, least = step, math.inf
    size = step * max(1, CHUNK_ROWS * batch // (rows * step))
    while size >= step:
        items = math.ceil(batch / size) * tiles_v
        idle = math.ceil(items / programs) * programs / items
        if idle < least - 0.03:
            best, least = size, idle
        size = size // 2 // step * step
    return best


# Bytes of lists and partial sums that a gradient may take beside its tensors; what needs more is done in ranges. 32 texts of
# 250,002 words fit, so that the rows of their tokens keep every multiprocessor busy.
WORKSPACE = 88 * 2**20
# Rows that a sum loads together; those of the next step are under way meanwhile.
ENTRIES = 2
# Entries of a part of a long row: a row with twice as many is cut, as the rows of frequent tokens win far more than others.
PART_ENTRIES = 1024
# Bytes of the table of words won by (chunk of the vocabulary, row).
TABLE = 2**23
# Words of a chunk of that table at least (many chunks keep many programs busy, and one writes an integer for every row
# of its text) and at most (16-bit integers say where in the chunk a word stands).
LEAST_CHUNK_WORDS, MOST_CHUNK_WORDS = 2**10, 2**15
# Words that one program of the gradient by weight goes through: most have few entries or none.
WORDS = 8


def weight_columns(dim: int) -> int:
    """Columns of a word's gradient that one program sums: all of them if it can, as a word has few entries."""
    return min(power_of_two(dim), 1024)


def hidden_columns(dim: int) -> int:
    """Columns of a row's gradient that one program sums: of 128 and 256 what leaves fewer idle.

    Programs for other columns come after all rows, so a third of the weight goes round at a time, and what rows that are
    summed at a time read stays in the L2.
    """
    return 256 if dim > 128 and -dim % 256 <= -dim % 128 else 128


def chunk_words(vocab: int, tokens: int) -> int:
    """Words of a chunk: as few as the size of the table allows."""
    words = LEAST_CHUNK_WORDS
    while words < MOST_CHUNK_WORDS and 4 * tokens * math.ceil(vocab / words) > TABLE:
        words *= 2
    return words
