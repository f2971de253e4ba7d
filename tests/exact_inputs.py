"""Inputs of the head whose logits every dtype computes exactly, so that all agree on the maxima and their positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LARGEST = 2  # magnitude of a drawn integer; its variance is 2


def draw_integers(shape: tuple[int, ...], largest: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Uniform integers from -largest to largest on the generator's device; int8 in between saves memory."""
    kind = torch.int8 if largest < 2**7 else torch.int32
    drawn = torch.randint(-largest, largest + 1, shape, generator=generator, device=generator.device, dtype=kind)
    return drawn.to(dtype)


def exact_rows(tokens: int, dim: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """(N, D) small integers; the first column is one, so that a word's first weight shifts its logits."""
    hidden = draw_integers((tokens, dim), LARGEST, generator, dtype)
    hidden[:, 0] = 1
    return hidden


def exact_words(
    vocab: int, dim: int, dtype: torch.dtype, generator: torch.Generator, *, below: float = 1.0, bias: bool = True
) -> tuple[Tensor, Tensor | None]:
    """(V, D) weight and (V,) bias for `exact_rows`: integers times a power of two that brings the logits to about 1.

    The logits' mean lies ``below`` standard deviations under zero. Counted in steps they stay under 2^15, which the
    kernels resolve with 16-bit operands.
    """
    deviation = 2 * math.sqrt(dim)
    step = 2.0 ** -round(math.log2(deviation))
    weight = draw_integers((vocab, dim), LARGEST, generator, dtype).mul_(step)
    weight[:, 0] = round(-below * deviation) * step  # rounded to the dtype: still a multiple of the step
    return weight, draw_integers((vocab,), int(deviation), generator, dtype).mul_(step) if bias else None
