"""Tile sizes of the Triton kernels and how the forward's work is laid out: one line per kind of product and shape.

What compiles apart in the forward pass: the kind of product, dtypes and the presence of a bias, which a model settles;
a tile for at most NARROW_ROWS rows and one for more; the positions' dtype, for texts of up to 256, 32,768 and more
rows. Nothing else of the batch: lengths, texts, rows, slots and chunks are read at run time. So one model compiles at
most six forward kernels, and one that copies rows.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """A tile of the forward product, all powers of two.

    Attributes:
        block_v, block_s, block_d: words by rows by columns of a step.
        num_warps, num_stages: warps and depth of the pipeline.
        per_sm: programs of a multiprocessor.
    """

    block_v: int
    block_s: int
    block_d: int
    num_warps: int
    num_stages: int
    per_sm: int = 1


@dataclass(frozen=True)
class ForwardPlan:
    """How the forward product is cut.

    Attributes:
        tile: its ``block_d`` is no wider than D needs.
        equal: rows of every slot, a power of two, if the device counts ``equal_from`` real tokens or more; otherwise,
            and with 0, a slot has the rows that its text needs.
        rows: upper bound of the slots' rows, from shapes.
        chunk: texts that a program goes through for one tile of words.
    """

    tile: Tile
    equal: int
    equal_from: int
    rows: int
    chunk: int


# Rows that all programs go through before the words start over: what the L2 serves beside the weight. 4,096 were slower
# everywhere (kernels_first_run.csv).
CHUNK_ROWS = 16384
# Rows of a slot come in multiples of this: two of the eight rows that a tensor core takes at a time. Groups of 256 for
# full texts were 1% faster at most (kernels_first_run.csv, "32x512 V250k g16").
GROUP = 16
# With equal slots a tile's texts are written at once: 613 against 573 TFLOP/s at 64 x 128, V = 250,002, 609 against 470
# at 512 x 32, V = 30,522 (kernels_first_run.csv, "g16"). They pay while repeated rows add few to the real ones, in 13
# mixes of lengths (forward_tuning.csv, "slots"): 1.16 against 1.25 ms at 1.2 and 1.13 against 0.97 at 1.5 for texts of
# up to 128, 1.14 against 1.28 at 1.2 for 256; for texts of up to 32 always (1.16 against 1.23 ms at 1.9).
EQUAL_ADDS, EQUAL_ALWAYS = 1.3, 32
# Rows up to which the narrow tile serves: one query. The wide one would multiply eight times as much as is there.
NARROW_ROWS = 32
# By kind of product, the narrow and the wide tile. Those for "227 KB" of shared memory are for sm_90 (sm_100 not
# measured), the others for all cards from sm_80 on: they fit in the 99 KB of sm_86, sm_89 and sm_120. KB are the
# compiled kernel's there and, where it differs, on sm_90. All times are an H200's (forward_tuning.csv): what fits in 99
# KB was chosen there as well. Narrow ones were timed with 1 x 32 rows, V = 250,002, wide ones with 32 x 512, V = 30,522.
TILES = {
    "16 bits, 227 KB": (
        # 61 KB. Bound by reading the weight, of which three programs keep 96 KB on the way: 0.110 ms against 0.136 with
        # one; others are no faster.
        Tile(block_v=128, block_s=NARROW_ROWS, block_d=64, num_warps=4, num_stages=3, per_sm=3),
        # 148 KB. 599 TFLOP/s at 32 x 512, V = 250,002, 597 with 4 stages (kernels_first_run.csv, "plain Triton"). The
        # Gluon kernel of Hopper takes its place there, with words and rows of the same number. Without bulk copies 1.75
        # ms, with half the rows 2.12.
        Tile(block_v=128, block_s=256, block_d=64, num_warps=8, num_stages=3),
    ),
    "16 bits": (
        # 41 KB, 61 on sm_90. A third program would not fit in 100 KB.
        Tile(block_v=128, block_s=NARROW_ROWS, block_d=64, num_warps=4, num_stages=3, per_sm=2),
        # 96 KB, 98 on sm_90. 2.12 ms; with 4 warps 2.20, with half the rows and two programs 2.64.
        Tile(block_v=128, block_s=128, block_d=64, num_warps=8, num_stages=3),
    ),
    "tf32, 227 KB": (
        # 61 KB. 0.200 ms, 0.197 with three programs, 0.31 with half the words.
        Tile(block_v=128, block_s=NARROW_ROWS, block_d=32, num_warps=4, num_stages=3, per_sm=2),
        # 148 KB. 2.39 ms; with half the rows 3.78, with twice the words and half the rows 3.05.
        Tile(block_v=128, block_s=256, block_d=32, num_warps=8, num_stages=3),
    ),
    "tf32": (
        # 41 KB, 61 on sm_90.
        Tile(block_v=128, block_s=NARROW_ROWS, block_d=32, num_warps=4, num_stages=3, per_sm=2),
        # 80 KB, 100 on sm_90. 3.78 ms; with 4 warps 3.70, with half the rows and two programs 4.93.
        Tile(block_v=128, block_s=128, block_d=32, num_warps=8, num_stages=3),
    ),
    "tf32x3": (
        # 41 KB, 48 on sm_90. 0.262 ms, 0.279 with three programs.
        Tile(block_v=128, block_s=NARROW_ROWS, block_d=32, num_warps=4, num_stages=3, per_sm=2),
        # 68 KB, 96 on sm_90. 10.6 ms; with twice the rows 15.2, with half and two programs 11.2, with 4 warps 24.4.
        Tile(block_v=128, block_s=128, block_d=32, num_warps=8, num_stages=3),
    ),
    # Without tensor cores: float32 on AMD's cards and before sm_80. A thread holds all columns of its operands.
    "ieee": (
        # 12 KB. 0.98 ms; 1.16 with 32 columns, 1.73 with half the words.
        Tile(block_v=128, block_s=NARROW_ROWS, block_d=16, num_warps=4, num_stages=2, per_sm=2),
        # 12 KB. 58 ms; 69 with 32 columns, 67 with twice the words, 122 with 8 warps.
        Tile(block_v=64, block_s=64, block_d=16, num_warps=4, num_stages=2, per_sm=2),
    ),
}


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


@functools.lru_cache(maxsize=4096)
def forward_plan(
    kind: str,
    batch: int,
    tokens: int,
    max_seqlen: int,
    vocab: int,
    dim: int,
    sms: int,
    tile: Tile | None = None,
) -> ForwardPlan:
    """Plans the forward product from what the host knows.

    Args:
        kind: key of TILES.
        batch: B >= 1; tokens: N, an upper bound; max_seqlen: upper bound of the lengths; vocab: V; dim: D.
        sms: multiprocessors.
        tile: instead of the table's.
    """
    longest = math.ceil(max(max_seqlen, 1) / GROUP) * GROUP
    equal = power_of_two(longest)
    rows = batch * equal
    narrow, wide = TILES[kind]
    if tile is None:
        tile = narrow if rows <= narrow.block_s else wide
    equal_from = 0 if equal <= EQUAL_ALWAYS else math.ceil(rows / EQUAL_ADDS)
    if equal > tile.block_s or equal_from > tokens:
        equal, rows = 0, min(tokens + batch * GROUP, batch * longest)
    tile = dataclasses.replace(tile, block_d=min(max(power_of_two(dim), 16), tile.block_d))
    step = tile.block_s // equal if equal else 1
    chunk = _chunk(batch, rows, math.ceil(vocab / tile.block_v), step, sms * tile.per_sm)
    return ForwardPlan(tile, equal, equal_from, rows, chunk)


def _chunk(batch: int, rows: int, tiles_v: int, step: int, programs: int) -> int:
    """Texts in a chunk: of CHUNK_ROWS rows, or fewer where a last wave half empty would cost 3% of the time."""
    best, least = step, math.inf
    size = step * max(1, CHUNK_ROWS * batch // (rows * step))
    while size >= step:
        items = math.ceil(batch / size) * tiles_v
        idle = math.ceil(items / programs) * programs / items
        if idle < least - 0.03:
            best, least = size, idle
        size = size // 2 // step * step
    return best


# Bytes of lists and partial sums that a gradient may take beside its tensors; what needs more is done in ranges. 32
# texts of 250,002 words fit, so that the rows of their tokens keep every multiprocessor busy.
WORKSPACE = 88 * 2**20
# Ranges in which the gradient by weight takes the vocabulary at most. The lists of a range may have more than WORKSPACE
# bytes then, half a byte for each of the (B, V) entries, of which the head holds six and more.
RANGES = 16
# Entries up to which one program sums all columns of a row: most rows have none where few words are active. The hidden
# gradient of 32 x 512 at 2% takes 0.070 ms with 2 and 4, 0.077 with 8; at 0.1% all the same (backward_tuning.csv).
FEW_ENTRIES = 4
# Entries of a part of a long row: a row with twice as many is cut, as the rows of frequent tokens win far more than
# others: with parts skewed positions cost 2.0 ms where they cost 5.4 without (backward_tuning.csv,
# kernels_first_run.csv). Smaller parts are sooner done, but a program is started for each there is room for: the hidden
# gradient of 32 x 512 takes 1.27 ms at 50% and skewed, 0.039 at 0.1%, and with half as many 1.12 and 0.046
# (backward_tuning.csv).
PART_ENTRIES = 2048
# Rows whose gradients are put in the order of how many words they win, a power of two from 32 on. Without an order the
# hidden gradient of 64 x 128 at 50% takes 2.26 ms, in segments of 256 rows 1.54, of 1,024 1.50, but ordering costs
# 0.007 and 0.015 ms (backward_tuning.csv).
SEGMENT = 256
# Bytes of the table of words won by (chunk of the vocabulary, row).
TABLE = 2**22
# Words of a chunk of that table: at least, a multiple of 256 (many chunks keep many programs busy, and one writes an
# integer for every row of its text), and at most (16-bit integers say where in the chunk a word stands).
LEAST_CHUNK_WORDS, MOST_CHUNK_WORDS = 2**10, 2**15
# Words that one program of the gradient by weight goes through: most have few entries or none. 64 x 128 at 50% takes
# 1.31 ms with 4, 1.36 with 8 and 16, and 32 x 512 at 0.1% 0.103, 0.105 and 0.108 (backward_tuning.csv).
WORDS = 4


def listed_words(vocab: int, batch: int) -> int:
    """Words of a range: as many as WORKSPACE has room for, with many texts what makes RANGES; places fit 32 bits."""
    least = min(math.ceil(vocab / RANGES), (2**31 - 1) // batch)
    return min(vocab, max(1, WORKSPACE // (8 * batch), least))


def weight_columns(dim: int) -> int:
    """Columns of a word's gradient that one program sums: all of them if it can, as a word has few entries.

    In thirds: 0.161 against 0.144 ms at 2%, 0.737 against 0.675 at 50% (backward_tuning.csv, D = 768).
    """
    return min(power_of_two(dim), 1024)


def hidden_columns(dim: int) -> int:
    """Columns of a row's gradient that one program sums: of 128 and 256 what leaves fewer idle.

    Programs for other columns come after all rows, so a third of the weight goes round at a time, and what rows that
    are summed at a time read stays in the L2: 0.81 ms against 1.17 in one piece (backward_tuning.csv, D = 768).
    """
    return 256 if dim > 128 and -dim % 256 <= -dim % 128 else 128


def chunk_words(vocab: int, tokens: int) -> int:
    """Words of a chunk: as few as the size of the table allows."""
    words = LEAST_CHUNK_WORDS
    while words < MOST_CHUNK_WORDS and 4 * tokens * math.ceil(vocab / words) > TABLE:
        words *= 2
    return words
