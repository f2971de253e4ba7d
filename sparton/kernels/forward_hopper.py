"""The forward kernel for Hopper, in Gluon: a TMA producer warp and two consumer warpgroups.

It computes what the plain Triton kernel computes from the same packed rows; only the schedule is written by hand.
Gluon is experimental, so whoever imports this file must be ready for the import to fail.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sparton.kernels.configs import GROUP

BLOCK_V = 128  # two consumers with the M of a wgmma each
BLOCK_S = 256  # the largest N of a wgmma, the most rows of a TMA box, and what 8 bits can number
BLOCK_D = 64  # 128 bytes: one row of the swizzle
NUM_STAGES = 4  # a power of two; 4 x 48 KiB of the 227 KiB of shared memory
# Stages that the second consumer lets pass before it starts, so that the two reach their epilogues at different times.
LEAD = 2
# What stays of a logit beside the code of its column. A kernel argument: as a constant it costs an instruction more.
LOGIT_BITS = -BLOCK_S


@gluon.jit
def _log1p(z):
    """log(1 + z) for z >= 0 that stays exact where 1 + z loses digits (Goldberg 1991, theorem 4)."""
    u = 1.0 + z
    plain = (u == 1.0) | (u == float("inf"))
    return gl.where(plain, z, gl.log(u) * (z / gl.where(plain, 1.0, u - 1.0)))


@gluon.jit
def _store_outputs(top, position, length, offs_out, mask, outputs, DOUBLE_LOG: gl.constexpr):
    """Applies the activation to the bits of maxima of any shape and writes output, factor and position."""
    out_ptr, factor_ptr, positions_ptr = outputs
    active = (top > 0) & (length > 0)
    z = gl.where(active, top, 0).to(gl.float32, bitcast=True)
    out = _log1p(z)
    factor = 1.0 / (1.0 + z)
    if DOUBLE_LOG:
        factor = factor / (1.0 + out)
        out = _log1p(out)
    factor = gl.where(active, factor, 0.0)
    # Rows past the length repeat the last one. The length may be 0.
    position = gl.maximum(gl.minimum(position, length - 1), 0)
    gl.store(out_ptr + offs_out, out.to(out_ptr.dtype.element_ty), mask=mask)
    gl.store(factor_ptr + offs_out, factor.to(factor_ptr.dtype.element_ty), mask=mask)
    gl.store(positions_ptr + offs_out, position.to(positions_ptr.dtype.element_ty), mask=mask)


@gluon.jit
def _group_max(logits, logit_bits, GROUP: gl.constexpr):
    """Maximum of each group of columns within a thread: (M, 256) logits to (M, groups, 4 lanes) coded words.

    A coded word is the bits of a logit whose low 8 are 255 - column, compared as an integer: that orders positive
    logits and, among equal ones, the lowest column first, keeps an infinity or a NaN on top, and misorders negative
    ones, which are inactive in any order. A thread of a wgmma accumulator holds the columns 8 j + 2 lane + {0, 1}: the
    bits of the lane are left to `_lane_max`, then the code of a register is a constant, and an element costs one logic
    instruction and one maximum.
    """
    M: gl.constexpr = logits.shape[0]
    N: gl.constexpr = logits.shape[1]
    offs_s = gl.arange(0, N, layout=gl.SliceLayout(0, logits.type.layout))
    codes = (offs_s ^ 255) & 0xF9
    coded = (logits.to(gl.int32, bitcast=True) & logit_bits) | codes[None, :]
    coded = gl.permute(gl.reshape(coded, [M, N // GROUP, GROUP // 8, 4, 2]), [0, 1, 2, 4, 3])
    return gl.max(gl.reshape(coded, [M, N // GROUP, GROUP // 4, 4]), axis=2)


@gluon.jit
def _pair_max(coded):
    """Maxima of the groups 0 and 1, 2 and 3, and so on: (M, groups, 4 lanes) to half the groups."""
    return gl.max(gl.reshape(coded, [coded.shape[0], coded.shape[1] // 2, 2, 4]), axis=2)


@gluon.jit
def _lane_max(coded):
    """Completes the codes of (M, groups, 4 lanes) and takes the maximum over the lanes: (M, groups)."""
    lane = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(0, coded.type.layout)))
    return gl.max(coded | ((lane ^ 3) << 1)[None, :][None, :, :], axis=2)


@gluon.jit
def _decode(coded):
    """Splits coded words into the bits of the logit and the column."""
    return coded & -256, 255 - (coded & 255)


@gluon.jit
def _chunk(item, num_v, B, chunk, starts_ptr):
    """First and last (exclusive) text and row of a work item. The vocabulary runs fastest: all SMs share the rows."""
    first_b = (item // num_v) * chunk
    last_b = gl.minimum(first_b + chunk, B)
    return first_b, last_b, gl.load(starts_ptr + first_b), gl.load(starts_ptr + last_b)


@gluon.jit
def _produce(ring, sizes, starts_ptr, rows_desc, weight_desc):
    """Producer warp: loads the operands of every step of this program into the ring of stages, in order.

    Its loops are those of `_consume`. Step n uses stage n % NUM_STAGES for the (n // NUM_STAGES)-th time. A fresh
    barrier passes for one whose odd phase is complete, so that the first wait for an empty stage falls through.
    """
    rows_smem, weight_smem, full, empty = ring
    B, V, D, chunk = sizes
    NUM_STAGES: gl.constexpr = rows_smem.shape[0]
    BLOCK_S: gl.constexpr = rows_smem.shape[1]
    BLOCK_D: gl.constexpr = rows_smem.shape[2]
    HALF_V: gl.constexpr = weight_smem.shape[1]
    num_v = gl.cdiv(V, 2 * HALF_V)
    step = 0
    for item in range(gl.program_id(0), num_v * gl.cdiv(B, chunk), gl.num_programs(0)):
        first_b, last_b, first_row, last_row = _chunk(item, num_v, B, chunk, starts_ptr)
        first_v = (item % num_v) * (2 * HALF_V)
        for row in range(first_row, last_row, BLOCK_S):
            for d in range(0, D, BLOCK_D):
                stage = step & (NUM_STAGES - 1)
                filled = full.index(stage)
                mbarrier.wait(empty.index(stage), ((step // NUM_STAGES) & 1) ^ 1)
                # What a box has outside its tensor is filled with zeros and counts like the rest.
                mbarrier.expect(filled, 2 * (BLOCK_S + 2 * HALF_V) * BLOCK_D)
                tma.async_copy_global_to_shared(weight_desc, [first_v, d], filled, weight_smem.index(2 * stage))
                tma.async_copy_global_to_shared(
                    weight_desc, [first_v + HALF_V, d], filled, weight_smem.index(2 * stage + 1)
                )
                tma.async_copy_global_to_shared(rows_desc, [row, d], filled, rows_smem.index(stage))
                step += 1


@gluon.jit
def _issue(logits, step, ring, HALF: gl.constexpr, use_acc: gl.constexpr):
    """Waits for the operands of a step and starts its product."""
    rows_smem, weight_smem, full, empty = ring
    NUM_STAGES: gl.constexpr = rows_smem.shape[0]
    stage = step & (NUM_STAGES - 1)
    mbarrier.wait(full.index(stage), (step // NUM_STAGES) & 1)
    weight = weight_smem.index(2 * stage + HALF)
    logits = warpgroup_mma(weight, rows_smem.index(stage).permute([1, 0]), logits, use_acc=use_acc, is_async=True)
    # Every group but this one is complete, and their stages are free.
    return warpgroup_mma_wait(num_outstanding=1, deps=[logits])


@gluon.jit
def _multiply(logits, step, ring, D, HALF: gl.constexpr):
    """The product of a tile, and the step after it. A group of wgmma is always in flight."""
    empty = ring[3]
    NUM_STAGES: gl.constexpr = ring[0].shape[0]
    BLOCK_D: gl.constexpr = ring[0].shape[2]
    logits = _issue(logits, step, ring, HALF, use_acc=False)  # so that nobody has to clear the accumulators
    for d in range(BLOCK_D, D, BLOCK_D):
        logits = _issue(logits, step + 1, ring, HALF, use_acc=True)
        mbarrier.arrive(empty.index(step & (NUM_STAGES - 1)))
        step += 1
    logits = warpgroup_mma_wait(num_outstanding=0, deps=[logits])
    mbarrier.arrive(empty.index(step & (NUM_STAGES - 1)))
    return logits, step + 1


@gluon.jit
def _store_texts(coded, equal, first_b, last_b, first_v, V, cu_seqlens_ptr, outputs, DOUBLE_LOG: gl.constexpr):
    """Writes the outputs of a tile whose texts have `equal` rows each; `coded` is (words, texts)."""
    # The four lanes that share a word all hold its maxima. Here every thread gets its own, neighbours in v.
    OUT: gl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [2, 2], [0, 1])
    top, column = _decode(gl.convert_layout(coded, OUT))
    offs_v = first_v + gl.arange(0, coded.shape[0], layout=gl.SliceLayout(1, OUT))[:, None]
    offs_b = first_b + gl.arange(0, coded.shape[1], layout=gl.SliceLayout(0, OUT))
    mask_b = offs_b < last_b  # the others belong to the next chunk or lie past the end
    length = gl.load(cu_seqlens_ptr + offs_b + 1, mask=mask_b, other=0)
    length = (length - gl.load(cu_seqlens_ptr + offs_b, mask=mask_b, other=0)).to(gl.int32)[None, :]
    offs_out = offs_b.to(gl.int64)[None, :] * V + offs_v
    mask = mask_b[None, :] & (offs_v < V)
    _store_outputs(top, column & (equal - 1), length, offs_out, mask, outputs, DOUBLE_LOG)


@gluon.jit
def _store_equal(
    maxima, equal, b, last_b, first_v, V, cu_seqlens_ptr, outputs, GROUP: gl.constexpr, DOUBLE_LOG: gl.constexpr
):
    """Takes the maxima of groups on to those of texts with `equal` rows, GROUP times a power of two, and writes."""
    for level in gl.static_range(maxima.shape[1].bit_length()):
        if level > 0:
            maxima = _pair_max(maxima)
        if equal == GROUP << level:
            _store_texts(_lane_max(maxima), equal, b, last_b, first_v, V, cu_seqlens_ptr, outputs, DOUBLE_LOG)


@gluon.jit
def _consume(
    ring,
    sizes,
    outputs,
    starts_ptr,
    cu_seqlens_ptr,
    bias_ptr,
    logit_bits,
    HALF: gl.constexpr,
    GROUP: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    DOUBLE_LOG: gl.constexpr,
    LEAD: gl.constexpr,
):
    """Consumer warpgroup: products and maxima of one half of the words of every tile."""
    B, V, D, chunk = sizes
    BLOCK_S: gl.constexpr = ring[0].shape[1]
    BLOCK_D: gl.constexpr = ring[0].shape[2]
    HALF_V: gl.constexpr = ring[1].shape[1]
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_S, 16])
    GATHERED: gl.constexpr = gl.BlockedLayout([1, BLOCK_S // GROUP // 2, 4], [16, 2, 1], [4, 1, 1], [2, 1, 0])
    WORDS: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, GATHERED))
    num_v = gl.cdiv(V, 2 * HALF_V)
    equal = gl.load(starts_ptr + B + 1)
    step = 0
    for item in range(gl.program_id(0), num_v * gl.cdiv(B, chunk), gl.num_programs(0)):
        b, last_b, first_row, last_row = _chunk(item, num_v, B, chunk, starts_ptr)
        first_v = (item % num_v) * (2 * HALF_V) + HALF * HALF_V
        offs_v = first_v + gl.arange(0, HALF_V, layout=WORDS)
        mask_v = offs_v < V
        if HAS_BIAS:
            offs_bias = first_v + gl.arange(0, HALF_V, layout=gl.SliceLayout(1, MMA))
            bias = gl.load(bias_ptr + offs_bias, mask=offs_bias < V, other=0.0).to(gl.float32)
        start = first_row
        end = gl.load(starts_ptr + b + 1)
        length = (gl.load(cu_seqlens_ptr + b + 1) - gl.load(cu_seqlens_ptr + b)).to(gl.int32)
        best = gl.full([HALF_V], -1, gl.int32, layout=WORDS)
        position = gl.zeros([HALF_V], gl.int32, layout=WORDS)
        for row in range(first_row, last_row, BLOCK_S):
            if HALF == 1 and LEAD > 0:
                # A stage of the first round: it can't be loaded anew before this consumer has used it.
                mbarrier.wait(ring[2].index(gl.minimum(LEAD, gl.cdiv(D, BLOCK_D) - 1)), 0, pred=step == 0)
            logits = gl.zeros([HALF_V, BLOCK_S], gl.float32, layout=MMA)
            logits, step = _multiply(logits, step, ring, D, HALF)
            if HAS_BIAS:
                # Before the maximum: then the sign of a coded maximum is that of the logit, and equal codes tie.
                logits += bias[:, None]
            maxima = _group_max(logits, logit_bits, GROUP)
            if equal > 0:
                _store_equal(maxima, equal, b, last_b, first_v, V, cu_seqlens_ptr, outputs, GROUP, DOUBLE_LOG)
                b += BLOCK_S // equal
            else:
                # Each thread gets all lanes of half the groups of one word, instead of its lane of all groups of two.
                groups = _lane_max(gl.convert_layout(maxima, GATHERED))
                offs_s = row + GROUP * gl.arange(0, BLOCK_S // GROUP, layout=gl.SliceLayout(0, gl.SliceLayout(2, GATHERED)))
                stop = gl.minimum(row + BLOCK_S, last_row)
                cursor = row
                while cursor < stop:
                    # Text b owns the rows from cursor to upto of this tile, and ends there or goes on in the next.
                    upto = gl.minimum(end, stop)
                    inside = (offs_s >= cursor) & (offs_s < upto)
                    top, column = _decode(gl.max(gl.where(inside[None, :], groups, -1), axis=1))
                    better = top > best  # strictly: a tie stays with the lower position
                    position = gl.where(better, row - start + column, position)
                    best = gl.where(better, top, best)
                    cursor = upto
                    if end <= stop:
                        offs_out = b.to(gl.int64) * V + offs_v
                        _store_outputs(best, position, length, offs_out, mask_v, outputs, DOUBLE_LOG)
                        best = gl.full([HALF_V], -1, gl.int32, layout=WORDS)
                        # Loaded long before they are used. Past the last text any element will do.
                        b += 1
                        start = end
                        end = gl.load(starts_ptr + gl.minimum(b + 1, B))
                        length = gl.load(cu_seqlens_ptr + gl.minimum(b + 1, B)) - gl.load(cu_seqlens_ptr + b)
                        length = length.to(gl.int32)


@gluon.jit(do_not_specialize=["B", "V", "D", "chunk", "logit_bits"])
def lsr_forward_hopper_kernel(
    rows_desc,
    weight_desc,
    starts_ptr,
    cu_seqlens_ptr,
    bias_ptr,
    out_ptr,
    factor_ptr,
    positions_ptr,
    B,
    V,
    D,
    chunk,
    logit_bits,
    GROUP: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    DOUBLE_LOG: gl.constexpr,
    NUM_STAGES: gl.constexpr,
    LEAD: gl.constexpr,
):
    """One persistent program per SM: work items are a block of words times a chunk of texts, vocabulary fastest."""
    rows_smem = gl.allocate_shared_memory(rows_desc.dtype, [NUM_STAGES] + rows_desc.block_shape, rows_desc.layout)
    weight_smem = gl.allocate_shared_memory(
        weight_desc.dtype, [2 * NUM_STAGES] + weight_desc.block_shape, weight_desc.layout
    )
    full = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(NUM_STAGES):
        mbarrier.init(full.index(stage), count=1)  # the producer's expectation; the bytes come on top
        mbarrier.init(empty.index(stage), count=2)  # an arrival of each consumer
    fence_async_shared()
    ring = (rows_smem, weight_smem, full, empty)
    sizes = (B, V, D, chunk)
    outputs = (out_ptr, factor_ptr, positions_ptr)
    first: gl.constexpr = 0  # a bare number in a tuple of arguments would become a tensor
    second: gl.constexpr = 1
    # fmt: off
    gl.warp_specialize(
        [
            (_consume, (ring, sizes, outputs, starts_ptr, cu_seqlens_ptr, bias_ptr, logit_bits,
                        first, GROUP, HAS_BIAS, DOUBLE_LOG, LEAD)),
            (_consume, (ring, sizes, outputs, starts_ptr, cu_seqlens_ptr, bias_ptr, logit_bits,
                        second, GROUP, HAS_BIAS, DOUBLE_LOG, LEAD)),
            (_produce, (ring, sizes, starts_ptr, rows_desc, weight_desc)),
        ],
        [4, 1],
        [240, 24],  # registers a thread; what is left, 240, is the first consumer's
    )
    # fmt: on


def hopper_forward_supports(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether the Hopper kernel can multiply with this weight in this compute dtype.

    Args:
        weight: (V, D).
        dtype: of the product.
    """
    return (
        weight.is_cuda
        and torch.version.hip is None  # capabilities of AMD's cards count something else
        and torch.cuda.get_device_capability(weight.device) == (9, 0)
        and dtype in (torch.bfloat16, torch.float16)
        and weight.shape[1] % 8 == 0  # TMA wants strides of whole 16 bytes, and the base at one
        and weight.data_ptr() % 16 == 0
    )


def hopper_forward(
    rows: Tensor,  # (R, D)
    starts: Tensor,  # (B + 1,)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    cu_seqlens: Tensor,  # (B + 1,)
    out: Tensor,  # (B, V)
    factor: Tensor,  # (B, V)
    positions: Tensor,  # (B, V)
    *,
    chunk: int,
    activation: str,
) -> None:
    """Fills `out`, `factor` and `positions`; all tensors contiguous, on one GPU of capability 9.0.

    Args:
        rows: (R, D), bfloat16 or float16, D a multiple of 8. Text b owns the rows starts[b] .. starts[b + 1]; those
            past its length repeat its last row. 16-byte aligned, as is `weight`.
        starts: (B + 2,) int32, B + 1 multiples of GROUP, every text having at least one group; then the rows that every
            text has, 16, 32, 64, 128 or 256, or 0 for all kinds.
        weight: (V, D), dtype of `rows`.
        bias: (V,), any float dtype, or None.
        cu_seqlens: (B + 1,) int32 or int64: the true lengths. A text of length 0 gets zeros.
        out: (B, V), bfloat16, float16 or float32: log1p(relu(best)), best the maximum over a text of rows . weight +
            bias with the lowest 8 of its 24 significant bits cleared (a relative error below 2^-15).
        factor: (B, V), float16 or float32: d out / d best.
        positions: (B, V), any integer dtype that holds them: the lowest row of the maximum, counted from starts[b].
        chunk: texts that a program works through before it goes on to other words; with equal slots they fill tiles.
        activation: "log1p" or "log1p_log1p".
    """
    batch, (vocab, dim) = len(cu_seqlens) - 1, weight.shape
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    programs = torch.cuda.get_device_properties(rows.device).multi_processor_count
    grid = (min(programs, triton.cdiv(vocab, BLOCK_V) * triton.cdiv(batch, chunk)),)
    lsr_forward_hopper_kernel[grid](
        TensorDescriptor(rows, [len(rows), dim], [dim, 1], [BLOCK_S, BLOCK_D], layout),
        TensorDescriptor(weight, [vocab, dim], [dim, 1], [BLOCK_V // 2, BLOCK_D], layout),
        starts,
        cu_seqlens,
        bias,
        out,
        factor,
        positions,
        batch,
        vocab,
        dim,
        chunk,
        LOGIT_BITS,
        GROUP=GROUP,
        HAS_BIAS=bias is not None,
        DOUBLE_LOG=activation == "log1p_log1p",
        NUM_STAGES=NUM_STAGES,
        LEAD=LEAD,
        num_warps=4,
    )
