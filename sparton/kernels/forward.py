"""The forward pass in Triton: packed rows in slots, one persistent kernel; the Gluon one where it runs."""

from __future__ import annotations

import functools
import os
from types import ModuleType

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sparton.kernels.configs import ForwardPlan, forward_plan
from sparton.kernels.slots import make_slots
from sparton.tiled import factor_dtype, position_dtype


@triton.jit
def _log1p(z):
    """log(1 + z) for z >= 0 that stays exact where 1 + z loses digits (Goldberg 1991, theorem 4)."""
    u = 1.0 + z
    return tl.where(u == 1.0, z, tl.log(u) * (z / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def _load_tile(source, first, d, ROWS, D, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr):
    """(BLOCK, BLOCK_D) of a contiguous (ROWS, D) matrix, zeros past its ends."""
    if TMA:
        return source.load([first, d])
    else:
        offs = first.to(tl.int64) + tl.arange(0, BLOCK)
        offs_d = d + tl.arange(0, BLOCK_D)
        mask = (offs < ROWS)[:, None] & (offs_d < D)[None, :]
        return tl.load(source + offs[:, None] * D + offs_d[None, :], mask=mask, other=0.0)


@triton.jit
def _group_maxima(logits, keep, EXACT: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr):
    """Maximum of each group of rows and its place in the tile, (BLOCK_V, GROUPS) each; not EXACT, both in one word.

    Logits are compared as integers, which orders positive ones, keeps an infinity or a NaN on top, and misorders
    negative ones; those are inactive in any order. Not EXACT, the low bits of a logit give way to the place, counted
    from the end so that the lowest place wins among equals: one logic and one max instruction an element. It costs
    2^-15 of the logit.
    """
    BLOCK_V: tl.constexpr = logits.shape[0]
    bits = logits.to(tl.int32, bitcast=True)
    if EXACT:
        grouped = tl.reshape(bits, (BLOCK_V, GROUPS, GROUP))
        top, place = tl.max(grouped, axis=2, return_indices=True, return_indices_tie_break_left=True)
        return top, place + (tl.arange(0, GROUPS) * GROUP)[None, :]
    else:
        # Four lanes share a row of the accumulator, two columns of eight each. What differs between lanes, bits 1 and 2,
        # comes in when each lane has its maximum: until then the places are constants.
        code = (GROUPS * GROUP - 1 - tl.arange(0, GROUPS * GROUP)) & ~6
        word = tl.reshape((bits & keep) | code[None, :], (BLOCK_V, GROUPS, GROUP // 8, 4, 2))
        word = tl.max(tl.max(word, axis=4), axis=2) | (6 - 2 * tl.arange(0, 4))[None, None, :]
        word = tl.max(word, axis=2)
        return word, word


@triton.jit
def _maximum_between(top, place, first, last, EXACT: tl.constexpr, GROUPS: tl.constexpr):
    """Maximum of the groups first .. last - 1: (BLOCK_V,), as those of the groups."""
    offs_g = tl.arange(0, GROUPS)
    inside = (offs_g >= first) & (offs_g < last)
    top = tl.where(inside[None, :], top, -1)
    if EXACT:
        top, group = tl.max(top, axis=1, return_indices=True, return_indices_tie_break_left=True)
        return top, tl.sum(tl.where(offs_g[None, :] == group[:, None], place, 0), axis=1)
    else:
        word = tl.max(top, axis=1)
        return word, word


@triton.jit
def _split(top, place, keep, EXACT: tl.constexpr, BLOCK_S: tl.constexpr):
    """The logit's bits and its place in the tile."""
    if EXACT:
        return top, place
    else:
        return top & keep, BLOCK_S - 1 - (top & ~keep)


@triton.jit
def _write(top, position, length, offs, mask, out_ptr, factor_ptr, positions_ptr, DOUBLE_LOG: tl.constexpr):
    """Activation, derivative and position of the maximal logits, given as bits, of texts with ``length`` rows."""
    active = (top > 0) & (length > 0)
    z = tl.where(active, top, 0).to(tl.float32, bitcast=True)
    out = _log1p(z)
    factor = 1.0 / (1.0 + z)
    if DOUBLE_LOG:
        factor = factor / (1.0 + out)
        out = _log1p(out)
    # A place past the end is a repetition of the last row.
    position = tl.maximum(tl.minimum(position, length - 1), 0)
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(factor_ptr + offs, tl.where(active, factor, 0.0).to(factor_ptr.dtype.element_ty), mask=mask)
    tl.store(positions_ptr + offs, position.to(positions_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _chunk_rows(starts_ptr, chunk_index, chunk, B):
    """First and last row of a chunk of texts."""
    first = tl.load(starts_ptr + tl.minimum(chunk_index * chunk, B))
    return first, tl.load(starts_ptr + tl.minimum(chunk_index * chunk + chunk, B))


@triton.jit(do_not_specialize=["B", "R", "num_chunks", "chunk"])  # what differs from batch to batch
def lsr_forward_kernel(
    rows,
    weight,
    bias_ptr,
    cu_seqlens_ptr,
    starts_ptr,
    out_ptr,
    factor_ptr,
    positions_ptr,
    B,
    V,
    D,
    R,
    num_chunks,
    chunk,
    keep,
    HAS_BIAS: tl.constexpr,
    DOUBLE_LOG: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    SHORT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A persistent program: tiles of BLOCK_V words, each against all rows of a chunk of texts.

    Vocabulary on the M side, rows on the N side: the maximum runs along N. Words count fastest, so that all programs
    go through the same rows and the L2 serves them. One flat loop over the steps of all tiles keeps loads going while a
    tile is reduced.
    """
    GROUPS: tl.constexpr = BLOCK_S // GROUP
    num_v = tl.cdiv(V, BLOCK_V)
    programs = tl.num_programs(0)
    item = tl.program_id(0)
    steps = 0
    for c in range(0, num_chunks):
        first, last = _chunk_rows(starts_ptr, c, chunk, B)
        mine = tl.cdiv((c + 1) * num_v - item, programs) - tl.cdiv(c * num_v - item, programs)
        steps += mine * tl.cdiv(last - first, BLOCK_S)

    c = item // num_v
    row, stop = _chunk_rows(starts_ptr, c, chunk, B)
    text = c * chunk
    text_start = row
    best = tl.full((BLOCK_V,), -1, tl.int32)  # bits of the running maximum; negative: inactive
    position = tl.zeros((BLOCK_V,), tl.int32)
    offs_g = tl.arange(0, GROUPS)
    logits = tl.zeros((BLOCK_V, BLOCK_S), tl.float32)
    d = 0
    # Where the loads are, which run ahead: a count of their own, so that they don't wait for what is reduced.
    load_item = item
    load_row = row
    load_stop = stop
    load_d = 0
    for _ in range(0, steps * tl.cdiv(D, BLOCK_D)):
        if load_d >= D:
            load_d = 0
            load_row += BLOCK_S
            if load_row >= load_stop:
                load_item += programs
                load_row, load_stop = _chunk_rows(starts_ptr, load_item // num_v, chunk, B)
        w = _load_tile(weight, (load_item % num_v) * BLOCK_V, load_d, V, D, BLOCK_V, BLOCK_D, TMA)
        h = _load_tile(rows, load_row, load_d, R, D, BLOCK_S, BLOCK_D, TMA)
        load_d += BLOCK_D
        logits = tl.dot(w, h.T, logits, input_precision=PRECISION)
        d += BLOCK_D
        if d >= D:
            first_v = (item % num_v) * BLOCK_V
            offs_v = first_v.to(tl.int64) + tl.arange(0, BLOCK_V)
            mask_v = offs_v < V
            if HAS_BIAS:
                # Before the maximum, for the sign: negative logits are inactive whatever their place.
                logits += tl.load(bias_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)[:, None]
            top, place = _group_maxima(logits, keep, EXACT, GROUPS, GROUP)
            if SHORT:
                offs_b = row // GROUP + offs_g
                mask_b = offs_b < B
                length = tl.load(cu_seqlens_ptr + offs_b + 1, mask=mask_b, other=0)
                length = (length - tl.load(cu_seqlens_ptr + offs_b, mask=mask_b, other=0)).to(tl.int32)
                offs = offs_b.to(tl.int64)[None, :] * V + offs_v[:, None]
                mask = mask_v[:, None] & mask_b[None, :]
                top, place = _split(top, place, keep, EXACT, BLOCK_S)
                place -= (offs_g * GROUP)[None, :]
                _write(top, place, length[None, :], offs, mask, out_ptr, factor_ptr, positions_ptr, DOUBLE_LOG)
            else:
                while text_start < tl.minimum(row + BLOCK_S, stop):
                    slot = tl.load(starts_ptr + text)
                    text_stop = tl.load(starts_ptr + text + 1)
                    first = (text_start - row) // GROUP
                    last = (text_stop - row) // GROUP
                    part, at = _maximum_between(top, place, first, last, EXACT, GROUPS)
                    part, at = _split(part, at, keep, EXACT, BLOCK_S)
                    better = part > best  # strictly: a tie stays with the lower position
                    best = tl.where(better, part, best)
                    position = tl.where(better, row - slot + at, position)
                    if text_stop <= row + BLOCK_S:
                        length = tl.load(cu_seqlens_ptr + text + 1) - tl.load(cu_seqlens_ptr + text)
                        offs = text.to(tl.int64) * V + offs_v
                        _write(
                            best, position, length.to(tl.int32), offs, mask_v,
                            out_ptr, factor_ptr, positions_ptr, DOUBLE_LOG,
                        )  # fmt: skip
                        best = tl.full((BLOCK_V,), -1, tl.int32)
                        text += 1
                    # Past the tile's end this ends the loop; a text that goes on starts again with the next tile.
                    text_start = tl.minimum(text_stop, row + BLOCK_S)
            logits = tl.zeros((BLOCK_V, BLOCK_S), tl.float32)
            d = 0
            row += BLOCK_S
            if row >= stop:
                item += programs
                c = item // num_v
                row, stop = _chunk_rows(starts_ptr, c, chunk, B)
                text = c * chunk
                text_start = row


def triton_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    activation: str,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the forward kernel; arguments and results as those of :func:`sparton.tiled.tiled_forward`."""
    batch, (vocab, dim) = len(cu_seqlens) - 1, weight.shape
    shape, device = (batch, vocab), hidden.device
    out = torch.empty(shape, dtype=out_dtype, device=device)
    factor = torch.empty(shape, dtype=factor_dtype(dtype), device=device)
    positions = torch.empty(shape, dtype=position_dtype(max_seqlen), device=device)
    if batch and vocab:
        on_cuda = device.type == "cuda"
        # The interpreter multiplies the bits of bfloat16 as if they were integers; in float32 the values are the same.
        operand = torch.float32 if dtype == torch.bfloat16 and not on_cuda else dtype
        hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
        weight, cu_seqlens = weight.to(operand).contiguous(), cu_seqlens.contiguous()
        bias = None if bias is None else bias.contiguous()
        bulk, precision = _bulk_copies_reach(weight), _precision(dtype)
        programs = torch.cuda.get_device_properties(device).multi_processor_count if on_cuda else 2
        plan = forward_plan(_kind(dtype, bulk, precision), batch, len(hidden), max_seqlen, vocab, dim, programs)
        rows, starts = make_slots(hidden, cu_seqlens, operand, plan)
        tensors = (rows, starts, weight, bias, cu_seqlens, out, factor, positions)
        hopper = _hopper_kernel()
        if hopper and plan.block_s == hopper.BLOCK_S and hopper.hopper_forward_supports(weight, dtype):
            hopper.hopper_forward(
                *tensors, group=plan.group, short=plan.short, chunk=plan.chunk, activation=activation
            )
        else:
            _plain_forward(tensors, plan, programs, dtype == torch.float32, bulk, precision, activation)
    return out, factor, positions


def _plain_forward(
    tensors: tuple[Tensor | None, ...],
    plan: ForwardPlan,
    programs: int,
    exact: bool,
    bulk: bool,
    precision: str,
    activation: str,
) -> None:
    rows, starts, weight, bias, cu_seqlens, *results = tensors
    batch, (vocab, dim) = len(cu_seqlens) - 1, weight.shape
    chunks = triton.cdiv(batch, plan.chunk)
    sources = (rows, weight)
    if bulk:
        sources = (
            TensorDescriptor.from_tensor(rows, [plan.block_s, plan.block_d]),
            TensorDescriptor.from_tensor(weight, [plan.block_v, plan.block_d]),
        )
    lsr_forward_kernel[(min(programs, triton.cdiv(vocab, plan.block_v) * chunks),)](
        *sources, bias, cu_seqlens, starts, *results, batch, vocab, dim, len(rows), chunks, plan.chunk, -plan.block_s,
        HAS_BIAS=bias is not None,
        DOUBLE_LOG=activation == "log1p_log1p",
        EXACT=exact,
        PRECISION=precision,
        TMA=bulk,
        SHORT=plan.short,
        GROUP=plan.group,
        BLOCK_V=plan.block_v,
        BLOCK_S=plan.block_s,
        BLOCK_D=plan.block_d,
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
    )  # fmt: skip


@functools.cache
def _hopper_module() -> ModuleType | None:
    """The Gluon kernel, or None where this Triton has not the (experimental) API that it is written for."""
    try:
        from sparton.kernels import forward_hopper
    except (ImportError, AttributeError):
        return None
    return forward_hopper


def _hopper_kernel() -> ModuleType | None:
    """The Gluon kernel unless SPARTON_HOPPER=0 (to compare) or the interpreter forbids it."""
    compiled = os.environ.get("TRITON_INTERPRET") != "1" and os.environ.get("SPARTON_HOPPER") != "0"
    return _hopper_module() if compiled else None


def _bulk_copies_reach(weight: Tensor) -> bool:
    """Whether bulk tensor copies can load the weight: rows of whole 16 bytes, on a card that has them."""
    if weight.shape[1] * weight.element_size() % 16 or weight.data_ptr() % 16:
        return False
    return weight.device.type == "cpu" or torch.cuda.get_device_capability(weight.device) >= (9, 0)


def _precision(dtype: torch.dtype) -> str:
    """What float32 operands are multiplied in, as ``torch.set_float32_matmul_precision`` says."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


def _kind(dtype: torch.dtype, bulk: bool, precision: str) -> str:
    if dtype == torch.float32:
        return "tf32" if precision == "tf32" else "fused multiply-add"
    return "tensor cores, bulk copies" if bulk else "tensor cores"
