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

from sparton.kernels import autotune
from sparton.kernels.configs import GROUP, TILES, ForwardPlan, forward_plan
from sparton.kernels.slots import make_slots
from sparton.tiled import factor_dtype, position_dtype

INTERPRETED = triton.knobs.runtime.interpret  # as the kernels below: from their definition on


@triton.jit
def _log1p(z):
    """log(1 + z) for z >= 0 that stays exact where 1 + z loses digits (Goldberg 1991, theorem 4)."""
    u = 1.0 + z
    plain = (u == 1.0) | (u == float("inf"))
    return tl.where(plain, z, tl.log(u) * (z / tl.where(plain, 1.0, u - 1.0)))


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
def _group_maxima(logits, keep, EXACT: tl.constexpr, GROUP: tl.constexpr):
    """Maximum of each group of rows and its place in the tile, (BLOCK_V, GROUPS) each; not EXACT, both in one word.

    Logits are compared as integers, which orders positive ones, keeps an infinity or a NaN on top, and misorders
    negative ones; those are inactive in any order. So is a NaN with the sign bit set: NVIDIA's units make none, but
    x86 does of inf * 0, and so the interpreter. Not EXACT, the low bits of a logit give way to the place, counted
    from the end so that the lowest place wins among equals: one logic and one max instruction an element. It costs
    2^-15 of the logit.
    """
    BLOCK_V: tl.constexpr = logits.shape[0]
    GROUPS: tl.constexpr = logits.shape[1] // GROUP
    bits = logits.to(tl.int32, bitcast=True)
    if EXACT:
        grouped = tl.reshape(bits, (BLOCK_V, GROUPS, GROUP))
        top, place = tl.max(grouped, axis=2, return_indices=True, return_indices_tie_break_left=True)
        return top, place + (tl.arange(0, GROUPS) * GROUP)[None, :]
    else:
        # Four lanes share a row of the accumulator, two columns of eight each. What differs between lanes, bits 1
        # and 2, comes in when each lane has its maximum: until then the places are constants.
        code = (GROUPS * GROUP - 1 - tl.arange(0, GROUPS * GROUP)) & ~6
        word = tl.reshape((bits & keep) | code[None, :], (BLOCK_V, GROUPS, GROUP // 8, 4, 2))
        word = tl.max(tl.max(word, axis=4), axis=2) | (6 - 2 * tl.arange(0, 4))[None, None, :]
        word = tl.max(word, axis=2)
        return word, word


@triton.jit
def _pair_maxima(top, place, EXACT: tl.constexpr):
    """Maxima of the groups 0 and 1, 2 and 3, and so on."""
    PAIRS: tl.constexpr = top.shape[1] // 2
    top = tl.reshape(top, (top.shape[0], PAIRS, 2))
    if EXACT:
        top, right_top = tl.split(top)
        place, right_place = tl.split(tl.reshape(place, (top.shape[0], PAIRS, 2)))
        better = right_top > top  # strictly: a tie stays with the lower place
        return tl.where(better, right_top, top), tl.where(better, right_place, place)
    else:
        word = tl.max(top, axis=2)
        return word, word


@triton.jit
def _maximum_between(top, place, first, last, EXACT: tl.constexpr):
    """Maximum of the groups first .. last - 1: (BLOCK_V,), as those of the groups."""
    offs_g = tl.arange(0, top.shape[1])
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
def _write_equal(
    top, place, keep, row, slot, offs_v, mask_v, cu_seqlens_ptr, out_ptr, factor_ptr, positions_ptr, B, V,
    EXACT: tl.constexpr, DOUBLE_LOG: tl.constexpr, GROUP: tl.constexpr, BLOCK_S: tl.constexpr
):  # fmt: skip
    """Writes all texts of a tile at once, where each has one slot of ``slot`` rows: GROUP, twice that and so on."""
    for level in tl.static_range(0, (BLOCK_S // GROUP).bit_length()):
        if level > 0:
            top, place = _pair_maxima(top, place, EXACT)
        if slot == GROUP << level:
            offs_t = tl.arange(0, top.shape[1])
            offs_b = row // slot + offs_t
            mask_b = offs_b < B
            length = tl.load(cu_seqlens_ptr + offs_b + 1, mask=mask_b, other=0)
            length = (length - tl.load(cu_seqlens_ptr + offs_b, mask=mask_b, other=0)).to(tl.int32)
            offs = offs_b.to(tl.int64)[None, :] * V + offs_v[:, None]
            mask = mask_v[:, None] & mask_b[None, :]
            logit, position = _split(top, place, keep, EXACT, BLOCK_S)
            position -= (offs_t * slot)[None, :]
            _write(logit, position, length[None, :], offs, mask, out_ptr, factor_ptr, positions_ptr, DOUBLE_LOG)


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
    GROUP: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A persistent program: tiles of BLOCK_V words, each against all rows of a chunk of texts.

    Vocabulary on the M side, rows on the N side: the maximum runs along N. Words count fastest, so that all programs
    go through the same rows and the L2 serves them. One flat loop over the steps of all tiles keeps loads going while a
    tile is reduced. Whether all slots have the same size is known on the device only.
    """
    equal = tl.load(starts_ptr + B + 1)
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
            top, place = _group_maxima(logits, keep, EXACT, GROUP)
            if equal > 0:
                _write_equal(
                    top, place, keep, row, equal, offs_v, mask_v, cu_seqlens_ptr, out_ptr, factor_ptr, positions_ptr,
                    B, V, EXACT, DOUBLE_LOG, GROUP, BLOCK_S,
                )  # fmt: skip
            else:
                while text_start < tl.minimum(row + BLOCK_S, stop):
                    slot = tl.load(starts_ptr + text)
                    text_stop = tl.load(starts_ptr + text + 1)
                    first = (text_start - row) // GROUP
                    last = (text_stop - row) // GROUP
                    part, at = _maximum_between(top, place, first, last, EXACT)
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
    """Launches the forward kernel; arguments and results as those of :func:`sparton.tiled.tiled_forward`.

    With SPARTON_AUTOTUNE=1 the plain kernel's tile is found by timing; results of two tiles differ by their rounding.
    """
    batch, (vocab, dim) = len(cu_seqlens) - 1, weight.shape
    shape, device = (batch, vocab), hidden.device
    out = torch.empty(shape, dtype=out_dtype, device=device)
    factor = torch.empty(shape, dtype=factor_dtype(dtype), device=device)
    positions = torch.empty(shape, dtype=position_dtype(max_seqlen), device=device)
    if batch and vocab:
        on_cuda = device.type == "cuda"
        # The interpreter multiplies the bits of bfloat16 as if they were integers; in float32 the values are the same.
        operand = torch.float32 if dtype == torch.bfloat16 and INTERPRETED else dtype
        hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
        weight, cu_seqlens = weight.to(operand).contiguous(), cu_seqlens.contiguous()
        bias = None if bias is None else bias.contiguous()
        bulk, precision = _bulk_copies_reach(weight), _precision(dtype, device)
        sms = torch.cuda.get_device_properties(device).multi_processor_count if on_cuda else 2
        kind, sizes = _kind(dtype, precision, device), (batch, len(hidden), max_seqlen, vocab, dim)
        plan = forward_plan(kind, *sizes, sms)
        hopper = _hopper_kernel()
        by_hopper = hopper and plan.tile.block_s == hopper.BLOCK_S and hopper.hopper_forward_supports(weight, dtype)

        def run(plan: ForwardPlan) -> None:
            rows, starts = make_slots(hidden, cu_seqlens, operand, plan)
            tensors = (rows, starts, weight, bias, cu_seqlens, out, factor, positions)
            if by_hopper:
                hopper.hopper_forward(*tensors, chunk=plan.chunk, activation=activation)
            else:
                _plain_forward(tensors, plan, sms, dtype == torch.float32, bulk, precision, activation)

        if not by_hopper and autotune.wanted(device):
            name = autotune.problem(device, kind, dtype, *sizes)
            tile = autotune.best_tile(name, kind, lambda tile: run(forward_plan(kind, *sizes, sms, tile)))
            plan = forward_plan(kind, *sizes, sms, tile)
        run(plan)
    return out, factor, positions


def _plain_forward(
    tensors: tuple[Tensor | None, ...],
    plan: ForwardPlan,
    sms: int,
    exact: bool,
    bulk: bool,
    precision: str,
    activation: str,
) -> None:
    rows, starts, weight, bias, cu_seqlens, *results = tensors
    batch, (vocab, dim) = len(cu_seqlens) - 1, weight.shape
    tile, chunks = plan.tile, triton.cdiv(batch, plan.chunk)
    sources = (rows, weight)
    if bulk:
        sources = (
            TensorDescriptor.from_tensor(rows, [tile.block_s, tile.block_d]),
            TensorDescriptor.from_tensor(weight, [tile.block_v, tile.block_d]),
        )
    lsr_forward_kernel[(min(sms * tile.per_sm, triton.cdiv(vocab, tile.block_v) * chunks),)](
        *sources, bias, cu_seqlens, starts, *results, batch, vocab, dim, len(rows), chunks, plan.chunk, -tile.block_s,
        HAS_BIAS=bias is not None,
        DOUBLE_LOG=activation == "log1p_log1p",
        EXACT=exact,
        PRECISION=precision,
        TMA=bulk,
        GROUP=GROUP,
        BLOCK_V=tile.block_v,
        BLOCK_S=tile.block_s,
        BLOCK_D=tile.block_d,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
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
    return None if INTERPRETED or os.environ.get("SPARTON_HOPPER") == "0" else _hopper_module()


def _bulk_copies_reach(weight: Tensor) -> bool:
    """Whether bulk tensor copies can load the weight: rows of whole 16 bytes, on a card that has them."""
    if weight.shape[1] * weight.element_size() % 16 or weight.data_ptr() % 16:
        return False
    return weight.device.type == "cpu" or _nvidia_capability(weight.device) >= (9, 0)


def _nvidia_capability(device: torch.device) -> tuple[int, int]:
    """(0, 0) for AMD's cards, which PyTorch calls "cuda" as well and whose capability counts something else."""
    return torch.cuda.get_device_capability(device) if torch.version.hip is None else (0, 0)


def _precision(dtype: torch.dtype, device: torch.device) -> str:
    """How float32 operands are multiplied: in TF32 where PyTorch's own products are, else as exactly as those.

    ``tf32x3`` multiplies the upper and the lower bits of the operands apart, on tensor cores: 5.5 times as fast as
    without them, and with a smaller error than ``torch.matmul`` (docs/log.md, 2026-11-24).
    """
    if dtype != torch.float32:
        return "ieee"
    # Not torch.get_float32_matmul_precision(), which raises after this was set: it can be set by either name.
    if torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "tf32x3" if device.type == "cuda" and _nvidia_capability(device) >= (8, 0) else "ieee"


def _kind(dtype: torch.dtype, precision: str, device: torch.device) -> str:
    """The key of TILES."""
    kind = precision if dtype == torch.float32 else "16 bits"
    # Hopper and Blackwell have 227 KB of shared memory for a program; consumer cards of later years 99 KB again.
    large = device.type == "cpu" or _nvidia_capability(device)[0] in (9, 10)
    return f"{kind}, 227 KB" if large and f"{kind}, 227 KB" in TILES else kind
