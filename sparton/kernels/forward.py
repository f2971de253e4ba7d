"""The forward kernel: product, maximum with its position, bias and activation in one pass over packed rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparton.kernels.configs import forward_tile
from sparton.tiled import position_dtype


@triton.jit
def _log1p(z):
    """log(1 + z) for z >= 0 that stays exact where 1 + z loses digits (Goldberg 1991, theorem 4)."""
    u = 1.0 + z
    return tl.where(u == 1.0, z, tl.log(u) * (z / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def lsr_forward_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    cu_seqlens_ptr,
    out_ptr,
    factor_ptr,
    positions_ptr,
    V,
    D,
    stride_hn,
    stride_wv,
    HAS_BIAS: tl.constexpr,
    DOUBLE_LOG: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: BLOCK_V words of one sequence, all of its tokens.

    Vocabulary on the M side, tokens on the N side: the maximum over tokens runs along N. Neighbouring programs share
    the sequence, so that its rows are served by L2.
    """
    num_v = tl.cdiv(V, BLOCK_V)
    b = (tl.program_id(0) // num_v).to(tl.int64)
    offs_v = (tl.program_id(0) % num_v).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_v = offs_v < V
    offs_d = tl.arange(0, BLOCK_D)
    offs_s = tl.arange(0, BLOCK_S)
    start = tl.load(cu_seqlens_ptr + b).to(tl.int64)
    length = (tl.load(cu_seqlens_ptr + b + 1).to(tl.int64) - start).to(tl.int32)

    best = tl.full((BLOCK_V,), float("-inf"), tl.float32)
    position = tl.zeros((BLOCK_V,), tl.int32)
    for first in range(0, length, BLOCK_S):
        mask_s = first + offs_s < length
        rows = start + first + offs_s
        logits = tl.zeros((BLOCK_V, BLOCK_S), tl.float32)
        for d in range(0, D, BLOCK_D):
            mask_d = d + offs_d < D
            w = tl.load(
                weight_ptr + offs_v[:, None] * stride_wv + (d + offs_d)[None, :],
                mask=mask_v[:, None] & mask_d[None, :],
                other=0.0,
            )
            h = tl.load(
                hidden_ptr + rows[None, :] * stride_hn + (d + offs_d)[:, None],
                mask=mask_s[None, :] & mask_d[:, None],
                other=0.0,
            )
            logits = tl.dot(w, h, logits, input_precision="ieee")
        logits = tl.where(mask_s[None, :], logits, float("-inf"))
        value, index = tl.max(logits, axis=1, return_indices=True, return_indices_tie_break_left=True)
        better = value > best  # strictly: a tie stays with the lower position
        best = tl.where(better, value, best)
        position = tl.where(better, first + index, position)

    if HAS_BIAS:
        # The bias is the same for every token: after the maximum it costs one addition a word.
        best += tl.load(bias_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)
    active = (best > 0.0) & (length > 0)
    z = tl.where(active, best, 0.0)
    out = _log1p(z)
    factor = 1.0 / (1.0 + z)
    if DOUBLE_LOG:
        factor = factor / (1.0 + out)
        out = _log1p(out)
    offs_out = b * V + offs_v
    tl.store(out_ptr + offs_out, out.to(out_ptr.dtype.element_ty), mask=mask_v)
    tl.store(factor_ptr + offs_out, tl.where(active, factor, 0.0), mask=mask_v)
    tl.store(positions_ptr + offs_out, position.to(positions_ptr.dtype.element_ty), mask=mask_v)


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
    hidden, weight = hidden.to(dtype).contiguous(), weight.to(dtype).contiguous()
    if dtype == torch.bfloat16 and hidden.device.type == "cpu":
        # The interpreter multiplies the bits of bfloat16 as if they were integers; in float32 the values are the same.
        hidden, weight = hidden.float(), weight.float()
    bias = None if bias is None else bias.contiguous()
    batch, (vocab, dim) = len(cu_seqlens) - 1, weight.shape
    out = torch.empty(batch, vocab, dtype=out_dtype, device=hidden.device)
    factor = torch.empty(batch, vocab, dtype=torch.float32, device=hidden.device)
    positions = torch.empty(batch, vocab, dtype=position_dtype(max_seqlen), device=hidden.device)
    tile = forward_tile(dtype, dim, max_seqlen)
    grid = (triton.cdiv(vocab, tile.block_v) * batch,)
    if grid[0]:
        lsr_forward_kernel[grid](
            hidden,
            weight,
            bias,
            cu_seqlens.contiguous(),
            out,
            factor,
            positions,
            vocab,
            dim,
            hidden.stride(0),
            weight.stride(0),
            HAS_BIAS=bias is not None,
            DOUBLE_LOG=activation == "log1p_log1p",
            BLOCK_V=tile.block_v,
            BLOCK_S=tile.block_s,
            BLOCK_D=tile.block_d,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return out, factor, positions
