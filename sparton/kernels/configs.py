"""Tile sizes of the Triton kernels: one fixed configuration per dtype and shape class."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ForwardTile:
    """A tile of the forward product: BLOCK_V words by BLOCK_S tokens, in steps of BLOCK_D."""

    block_v: int
    block_s: int
    block_d: int
    num_warps: int
    num_stages: int


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def forward_tile(dtype: torch.dtype, dim: int, max_seqlen: int) -> ForwardTile:
    """Chooses the forward tile: short sequences take a narrow one, so that little of it is padding.

    Args:
        dtype: of the operands. True float32 products have no tensor cores and fewer registers to spare.
        dim: D.
        max_seqlen: upper bound of the sequence lengths.
    """
    block_s = min(max(_power_of_two(max_seqlen), 16), 128)
    block_d = min(max(_power_of_two(dim), 16), 64)
    if dtype == torch.float32:
        return ForwardTile(64, min(block_s, 64), min(block_d, 32), num_warps=4, num_stages=2)
    return ForwardTile(128, block_s, block_d, num_warps=8 if block_s >= 64 else 4, num_stages=3)


def backward_block(dim: int) -> tuple[int, int]:
    """BLOCK_D of the gradient kernels (columns of a row that a program sums in registers) and its warps."""
    block_d = min(max(_power_of_two(dim), 16), 1024)
    return block_d, 1 if block_d <= 256 else 4
