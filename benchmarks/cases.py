"""The shapes that bench_head.py measures, and the inputs drawn for them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import sparton
from sparton.tiled import position_dtype

IMPLS = ("naive", "naive_max_first", "compiled", "tiled", "sparton", "sparton_padded", "matmul")
STEP_IMPLS = ("naive", "compiled", "sparton")  # what the bars of a whole step compare
SKEWED_TOKENS, SKEW = 4, 4.0  # so many tokens of each text are so many times longer than the others


@dataclass(frozen=True)
class Case:
    """One shape with one distribution.

    Attributes:
        name: what ``--cases`` searches and bars.py looks up.
        batch: B; longest, shortest: S and the smallest length (None: all texts have S tokens); vocab: V; dim: D.
        active: share of the outputs that are > 0.
        skewed: whether a few tokens of each text win most of its words.
        trains: whether there is a backward pass (encoding a query has none).
        impls: what is measured; quick: what of it the bars need.
    """

    name: str
    batch: int
    longest: int
    vocab: int
    shortest: int | None = None
    active: float = 0.5
    skewed: bool = False
    trains: bool = True
    impls: tuple[str, ...] = ("naive", "naive_max_first", "compiled", "tiled", "sparton")
    quick: tuple[str, ...] = ("sparton",)
    dim: int = 768

    def tiny(self) -> Case:
        """The same kind of case at a size for Triton's interpreter; its name says so."""
        shortest = None if self.shortest is None else max(1, self.shortest // 64)
        return dataclasses.replace(
            self, name=f"tiny/{self.name}", batch=min(self.batch, 3), longest=max(2, self.longest // 64),
            shortest=shortest, vocab=self.vocab // 3000, dim=16,
        )  # fmt: skip


def _cases() -> list[Case]:
    packed_and_padded = (*Case.impls, "sparton_padded")
    forward = [
        Case(f"forward/32x512/{v}", 32, 512, v, impls=(*Case.impls, "matmul"), quick=("sparton", "matmul"))
        for v in (250_002, 30_522)
    ] + [
        Case("forward/64x128/250002", 64, 128, 250_002),
        Case("forward/32x100-512/250002", 32, 512, 250_002, shortest=100, impls=packed_and_padded),
        Case("forward/512x32/30522", 512, 32, 30_522),
        Case("forward/512x8-32/30522", 512, 32, 30_522, shortest=8, impls=packed_and_padded),
        Case("forward/1x32/250002", 1, 32, 250_002, trains=False),
    ]
    backward = [
        Case(
            f"backward/32x512/250002/{active:.1%}{'/skewed' if skewed else ''}", 32, 512, 250_002,
            active=active, skewed=skewed, quick=() if skewed and active < 0.5 else ("sparton",),
        )
        for active in (0.5, 0.02, 0.001) for skewed in (False, True)
    ] + [
        Case("backward/64x128/250002/50.0%", 64, 128, 250_002),
        Case("backward/32x512/30522/50.0%", 32, 512, 30_522),
    ]  # fmt: skip
    # Lengths as in real batches: about two thirds of the padded layout are tokens.
    step = [
        Case(f"step/{name}", *shape, active=active, impls=packed_and_padded, quick=(*STEP_IMPLS, "sparton_padded"))
        for name, shape, active in (
            ("32x512/250002/2.0%", (32, 512, 250_002, 160), 0.02),
            ("64x128/250002/50.0%", (64, 128, 250_002, 40), 0.5),
            ("32x512/30522/50.0%", (32, 512, 30_522, 160), 0.5),
        )
    ]
    return forward + backward + step


CASES = _cases()
SWEEP_BASE = {"batch": 32, "longest": 256, "vocab": 250_002}
SWEEP_AXES = {
    "batch": (8, 16, 32, 64, 128, 256),
    "longest": (32, 64, 128, 256, 512, 1024),
    "vocab": (30_522, 50_368, 119_547, 250_002),  # BERT, ModernBERT, mBERT, XLM-R
}


def sweep_cases() -> list[Case]:
    """One case for each point on the three axes through SWEEP_BASE: random lengths, 2% active."""
    points = [SWEEP_BASE | {axis: value} for axis, values in SWEEP_AXES.items() for value in values]
    unique = {tuple(point.values()): point for point in points}.values()
    return [
        Case(
            f"sweep/{p['batch']}x{p['longest']}/{p['vocab']}", **p, shortest=p["longest"] * 5 // 16, active=0.02,
            impls=("naive", "compiled", "tiled", "sparton"), quick=STEP_IMPLS,
        )
        for p in unique
    ]  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """Inputs of a case in both layouts; those that need gradients are leaves that require them."""

    case: Case
    lengths: list[int]
    packed: Tensor  # (N, D)
    padded: Tensor  # (B, S, D), NaN-free padding
    mask: Tensor  # (B, S) int64, as a tokenizer gives it
    cu_seqlens: Tensor  # (B + 1,) int32
    decoder: nn.Linear  # weight (V, D), bias (V,)
    grad: Tensor  # (B, V), the upstream gradient, dense

    @property
    def tokens(self) -> int:
        """N, real tokens only."""
        return len(self.packed)

    @property
    def forward_flops(self) -> float:
        """2 * N * D * V."""
        return 2.0 * self.tokens * self.decoder.weight.numel()

    @property
    def forward_bytes(self) -> int:
        """The fewest bytes a forward pass moves: inputs read once, outputs and positions written once."""
        weight = self.decoder.weight
        read = (self.tokens + len(weight)) * weight.shape[1] + len(weight)
        return read * weight.element_size() + self.grad.numel() * self._bytes_per_output

    @property
    def step_bytes(self) -> int:
        """What a step must keep beyond its inputs: output, positions, gradients and one packed copy of hidden."""
        weight = self.decoder.weight
        gradients = self.packed.numel() + weight.numel() + len(weight)
        outputs = self.grad.numel() * self._bytes_per_output
        return outputs + (gradients + self.packed.numel()) * weight.element_size()

    @property
    def _bytes_per_output(self) -> int:
        return self.grad.element_size() + position_dtype(max(self.lengths)).itemsize


def build(case: Case, device: torch.device, dtype: torch.dtype, *, seed: int = 0) -> Problem:
    """Draws the inputs of a case.

    Hidden rows and words are normal, so that every token is equally likely to win a word; in a skewed case the first
    SKEWED_TOKENS rows of each text are SKEW times longer and win nearly all of its active words. How many words are
    active is set by one bias for all of them, the negative quantile of the maximal logits: what is timed is a real
    forward pass, and the backward pass sees the positions it gave. The upstream gradient is dense.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    lengths = _lengths(case, seed)
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    mask = real.long().to(device)
    padded = draw(case.batch, max(lengths), case.dim)
    if case.skewed:
        padded[:, :SKEWED_TOKENS] *= SKEW
    padded = (padded * mask[..., None]).to(dtype)
    packed = padded[mask.bool()]
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]).int().to(device)
    weight = (draw(case.vocab, case.dim) / case.dim**0.5).to(dtype)
    grad = draw(case.batch, case.vocab).to(dtype)
    bias = _bias(packed, weight, cu_seqlens, max(lengths), case.active)
    decoder = nn.Linear(1, 1, device="meta")
    decoder.weight, decoder.bias = (nn.Parameter(t, requires_grad=case.trains) for t in (weight, bias))
    leaves = (t.requires_grad_(case.trains) for t in (packed, padded))
    return Problem(case, lengths, *leaves, mask, cu_seqlens, decoder, grad)


def _lengths(case: Case, seed: int) -> list[int]:
    if case.shortest is None:
        return [case.longest] * case.batch
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(case.shortest, case.longest + 1, (case.batch,), generator=generator)
    lengths[0] = case.longest
    return lengths.tolist()


@torch.no_grad()
def _bias(packed: Tensor, weight: Tensor, cu_seqlens: Tensor, longest: int, active: float) -> Tensor:
    rep = sparton.lsr_head(
        packed, weight, cu_seqlens=cu_seqlens, max_seqlen=longest, out_dtype=torch.float32, impl="tiled"
    )
    # quantile() takes at most 2^24 values; that many are plenty.
    level = rep.expm1().flatten()[: 2**24].quantile(1 - active)
    return (-level).to(weight.dtype).expand(len(weight)).contiguous()
