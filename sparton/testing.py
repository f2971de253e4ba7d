"""Inputs and comparisons that tests and benchmarks share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparton.functional import lsr_head
from sparton.reference import lsr_head_reference

# What an error may exceed the naive head's by, relative to the norm of the truth: a few roundings of the dtype.
EPSILON = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass(frozen=True)
class Inputs:
    """Packed inputs of the head and an upstream gradient; ``leaves()`` gives fresh copies that require gradients."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    lengths: list[int]
    grad: Tensor  # (B, V)

    @property
    def cu_seqlens(self) -> Tensor:
        """(B + 1,) int32."""
        return torch.tensor([0, *torch.tensor(self.lengths).cumsum(0).tolist()], device=self.hidden.device).int()

    def leaves(self, dtype: torch.dtype) -> list[Tensor | None]:
        """hidden, weight and bias in ``dtype``, detached."""
        tensors = (self.hidden, self.weight, self.bias)
        return [None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]


def make_inputs(
    lengths: list[int],
    dim: int,
    vocab: int,
    *,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    shift: float = -1.0,
    seed: int = 0,
) -> Inputs:
    """Draws inputs that ``dtype`` represents exactly, so that every dtype is compared with one float64 truth.

    Args:
        lengths: rows of each sequence, 0 allowed.
        dim: D; vocab: V.
        bias: whether there is one; its mean ``shift`` decides how many outputs are active.
        dtype: the values are rounded to it and returned in float64.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).double().to(device)

    offset = (torch.randn(vocab, generator=generator) + shift).to(dtype).double().to(device) if bias else None
    return Inputs(
        draw(sum(lengths), dim), draw(vocab, dim) / 4, offset, list(lengths), draw(len(lengths), vocab)
    )


def truth(inputs: Inputs) -> list[Tensor | None]:
    """Output and the gradients by hidden, weight and bias (None without one), all in float64."""
    hidden, weight, bias = inputs.leaves(torch.float64)
    out = lsr_head_reference(hidden, weight, bias, inputs.lengths)
    return _with_gradients(out, [hidden, weight, bias], inputs.grad)


def compute(inputs: Inputs, impl: str, dtype: torch.dtype) -> list[Tensor | None]:
    """The same four from an implementation in a dtype."""
    leaves = inputs.leaves(dtype)
    out = lsr_head(*leaves, cu_seqlens=inputs.cu_seqlens, max_seqlen=max(inputs.lengths, default=0), impl=impl)
    return _with_gradients(out, leaves, inputs.grad)


def _with_gradients(out: Tensor, leaves: list[Tensor | None], grad: Tensor) -> list[Tensor | None]:
    present = [leaf for leaf in leaves if leaf is not None]
    gradients = iter(
        torch.autograd.grad(out, present, grad.to(out.dtype), allow_unused=True, materialize_grads=True)
    )
    return [out.detach(), *(None if leaf is None else next(gradients) for leaf in leaves)]


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of ``expected`` (over 1 where that is zero)."""
    norm = expected.double().norm().item()
    return (got.double() - expected.double()).norm().item() / (norm or 1.0)


def assert_no_worse(name: str, got: Tensor, naive: Tensor, expected: Tensor, epsilon: float) -> None:
    """Asks for an error of at most the naive head's in the same dtype plus ``epsilon``; NaN never passes.

    Raises:
        AssertionError: with the name, both errors and their ratio.
    """
    error, allowed = relative_error(got, expected), relative_error(naive, expected) + epsilon
    if not error <= allowed:
        raise AssertionError(f"{name}: error {error:.3e}, allowed {allowed:.3e}, ratio {error / allowed:.2f}")
