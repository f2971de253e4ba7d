"""NaiveHead, CompiledHead, TiledHead, SpartonHead: one signature, one state_dict."""

from __future__ import annotations

import functools
import math
from typing import Self

import torch
from torch import Tensor, nn

from sparton.functional import ACTIVATIONS, lsr_head


class _Head(nn.Module):
    """A learned sparse head over a vocabulary; subclasses differ in how they compute it, never in what.

    Args:
        hidden_size: D.
        vocab_size: V.
        bias: whether the words have a bias.
        activation: "log1p" or "log1p_log1p".

    Attributes:
        weight: (V, D) parameter; bias: (V,) parameter or None.
        pads: whether packed texts are padded to the longest for a (B, S, V) tensor: short and long ones then belong in
            calls of their own.
    """

    impl: str
    pads = False

    def __init__(self, hidden_size: int, vocab_size: int, bias: bool = True, *, activation: str = "log1p") -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.register_parameter("bias", nn.Parameter(torch.zeros(vocab_size)) if bias else None)
        nn.init.normal_(self.weight, std=1 / math.sqrt(hidden_size))

    @classmethod
    def from_linear(cls, decoder: nn.Linear, *, activation: str = "log1p") -> Self:
        """Ties a head to a language model's output embedding: its weight and bias *are* the decoder's parameters."""
        vocab_size, hidden_size = decoder.weight.shape
        with torch.device("meta"):
            head = cls(hidden_size, vocab_size, bias=decoder.bias is not None, activation=activation)
        head.weight, head.bias = decoder.weight, decoder.bias
        return head

    def forward(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """Computes the sparse vectors, (B, V), of padded (B, S, D) or packed (N, D) hidden states; see `lsr_head`."""
        return self._compute(
            hidden, self.weight, self.bias, attention_mask, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen,
            activation=self.activation,
        )

    def _compute(self, *args, **kwargs) -> Tensor:
        return lsr_head(*args, **kwargs, impl=self.impl)

    def extra_repr(self) -> str:
        vocab_size, hidden_size = self.weight.shape
        return f"{hidden_size}, {vocab_size}, bias={self.bias is not None}, activation={self.activation!r}"


class NaiveHead(_Head):
    """The head in SPLADE's order of operations: stores several (B, S, V) tensors."""

    impl = "naive"
    pads = True


class TiledHead(_Head):
    """The head over vocabulary tiles in PyTorch with its own gradients; any device, no (B, S, V) tensor."""

    impl = "tiled"


class SpartonHead(_Head):
    """The fused Triton kernels; needs a CUDA device (or ``TRITON_INTERPRET=1``)."""

    impl = "triton"


@functools.cache
def _compiled_naive():
    """The naive head under torch.compile, one for the process, and the list that counts its graphs."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        graphs.append(len(inputs))
        return torch._inductor.compile(graph, inputs)

    def naive(*args, **kwargs):
        return lsr_head(*args, **kwargs, impl="naive")

    return torch.compile(naive, dynamic=True, fullgraph=True, backend=backend), graphs


class CompiledHead(_Head):
    """``torch.compile`` of the naive head with dynamic shapes.

    When the recompilation limit is reached it raises, instead of running eagerly without a word.
    """

    impl = "naive"
    pads = True

    @property
    def compile_count(self) -> int:
        """Graphs compiled in this process so far, for all compiled heads together."""
        return len(_compiled_naive()[1])

    def _compute(self, *args, **kwargs) -> Tensor:
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            return _compiled_naive()[0](*args, **kwargs)
