"""Poisoned memory: what torch.empty hands out starts as NaN or garbage, between canaries."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor

GUARD = 2**16  # bytes on either side of a tensor; a multiple of any alignment that a kernel asks for
NAN, GARBAGE = 0xFF, 0x7F  # every byte of a floating tensor (then it is NaN) and of any other


class Memory:
    """Allocations with poison in them and around them."""

    def __init__(self) -> None:
        self._plain, self._split = torch.empty, Tensor.split
        self._blocks: list[tuple[Tensor, int, int]] = []  # bytes, size of the tensor within, poison

    def empty(self, *size, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Tensor:
        """Stands in for torch.empty: a tensor full of poison in the middle of a larger buffer of it."""
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        count = math.prod(shape) * dtype.itemsize
        poison = NAN if dtype.is_floating_point else GARBAGE
        block = self._plain(GUARD + -(-count // 16) * 16 + GUARD, dtype=torch.uint8, device=device).fill_(poison)
        self._blocks.append((block, count, poison))
        return block[GUARD : GUARD + count].view(dtype).view(shape)

    def empty_like(self, tensor: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """Stands in for torch.empty_like; always contiguous."""
        return self.empty(*tensor.shape, dtype=dtype or tensor.dtype, device=tensor.device)

    def split(self, tensor: Tensor, sizes: int | list[int], dim: int = 0) -> tuple[Tensor, ...]:
        """Stands in for Tensor.split: lists that are cut from one new tensor lie apart, with poison around each."""
        if not self.holds(tensor):
            return self._split(tensor, sizes, dim)
        return tuple(self.empty(size, dtype=tensor.dtype, device=tensor.device) for size in sizes)

    def place(self, tensor: Tensor | None) -> Tensor | None:
        """A contiguous copy of an input with poison around it."""
        return None if tensor is None else self.empty_like(tensor).copy_(tensor.detach())

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in this memory."""
        start = tensor.untyped_storage().data_ptr()
        return any(block.untyped_storage().data_ptr() == start for block, *_ in self._blocks)

    def check(self) -> None:
        """Looks at the canaries of all blocks.

        Raises:
            AssertionError: where something beside a tensor was written.
        """
        touched = [
            (part != poison).any()
            for block, count, poison in self._blocks
            for part in (block[:GUARD], block[GUARD + count :])
        ]
        if touched and torch.stack(touched).any():
            sides = [f"{('before', 'after')[i % 2]} block {i // 2}" for i, t in enumerate(touched) if t]
            raise AssertionError(f"written outside of a tensor: {', '.join(sides)} of {len(self._blocks)}")


@contextlib.contextmanager
def poisoned() -> Iterator[Memory]:
    """Patches torch.empty, torch.empty_like and Tensor.split, and looks at the canaries at the end."""
    memory = Memory()
    cut = mock.patch.object(Tensor, "split", lambda tensor, *sizes, **dim: memory.split(tensor, *sizes, **dim))
    with cut, mock.patch.multiple(torch, empty=memory.empty, empty_like=memory.empty_like):
        yield memory
    memory.check()
