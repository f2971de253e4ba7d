"""Random shapes, dtypes and layouts of the Triton head on poisoned memory: 1,000 on a GPU, a few in the interpreter."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import sparton
from sparton.reference import lsr_head_reference
from sparton.testing import EPSILON, assert_no_worse
from tests.exact_inputs import exact_rows, exact_words
from tests.poison import GUARD, poisoned

pytest.importorskip("triton")

from sparton.kernels import configs  # noqa: E402

NAMES = ("hidden", "weight", "bias")
ON_GPU = torch.cuda.is_available()
PROFILES, CASES = (25, 40) if ON_GPU else (15, 2)
DIMS = (768, 13, 16, 1030, 384, 72, 8192, 100, 1024, 2056, 24) if ON_GPU else (13, 16, 1030, 24, 72, 5, 100)
LONGEST = (30, 512, 1, 200, 64, 1000, 5, 8192, 129, 300) if ON_GPU else (5, 40, 1, 70, 17, 30, 2, 9)
LEAST_WORDS, MOST_WORDS, MOST_TEXTS = (17, 50_000, 400) if ON_GPU else (3, 200, 6)
MOST_LOGITS, MOST_WEIGHTS = 2**25, 2**27  # B * S * V, which the naive head stores, and V * D or B * S * D
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
WANTED = [(True, True, True)] * 5 + [(h, w, b) for h in (True, False) for w in (True, False) for b in (True, False)]
BELOW = (2.0, 1.0, 1.0, 0.0, -1.0, -30.0, 30.0)  # all inactive with the last, all active with the one before


@dataclass(frozen=True)
class Profile:
    """What kernels may be compiled for; the cases of a profile share it, because a variant costs a second or more."""

    dtype: torch.dtype
    master: bool  # weight and bias in float32 although the product has 16 bits
    dim: int
    longest: int
    bias: bool
    activation: str
    padded: bool
    exact: bool  # integers, so that even float32 has no doubt about a maximum
    words: str  # "one", a "multiple" of 16 or "any" other number of them
    transposed: bool  # strides of the upstream gradient
    offsets: torch.dtype  # of cu_seqlens

    @classmethod
    def draw(cls, index: int) -> Profile:
        """Goes round dtypes, widths and lengths (their numbers have no common factor) and draws the rest."""
        rng = random.Random(index)
        dtype = DTYPES[index % len(DTYPES)]
        return cls(
            dtype=dtype,
            master=dtype.itemsize == 2 and rng.random() < 0.3,
            dim=DIMS[index % len(DIMS)],
            longest=LONGEST[index % len(LONGEST)],
            bias=rng.random() < 0.7,
            activation=rng.choice(["log1p", "log1p", "log1p_log1p"]),
            padded=rng.random() < 0.4,
            exact=rng.random() < 0.75,
            words=rng.choice(["any"] * 7 + ["multiple"] * 2 + ["one"]),
            transposed=rng.random() < 0.2,
            offsets=rng.choice([torch.int32, torch.int32, torch.int64]),
        )


@dataclass
class Case:
    """One batch; ``rows`` are the real ones in order, (N, D), ``place`` puts them where the layout has them."""

    profile: Profile
    lengths: list[int]
    rows: Tensor
    weight: Tensor
    bias: Tensor | None
    grad: Tensor
    wanted: tuple[bool, bool, bool]
    layout: dict
    place: Tensor  # index of each real row among the flattened rows that the head gets
    shape: tuple[int, ...]  # of hidden

    def __str__(self) -> str:
        sizes = f"V {len(self.weight)}, lengths {self.lengths[:12]} of {len(self.lengths)}"
        return f"{self.profile}, {sizes}, wanted {self.wanted}"

    def hidden(self) -> Tensor:
        """What the head gets: NaN wherever there is no real row."""
        rows = torch.full((math.prod(self.shape[:-1]), self.shape[-1]), float("nan"), device=self.rows.device)
        return rows.to(self.rows.dtype).index_copy(0, self.place, self.rows).view(self.shape)


def draw_lengths(rng: random.Random, batch: int, longest: int) -> list[int]:
    """Full, evenly ragged, very ragged or nearly all empty."""
    style = rng.choice(["full", "even", "even", "few", "empty"])
    if style == "full":
        return [longest] * batch
    if style == "even":
        return [rng.randint(0, longest) for _ in range(batch)]
    lengths = [rng.choice([0, 1]) if style == "few" else 0 for _ in range(batch)]
    lengths[rng.randrange(batch)] = longest
    return lengths


def draw_case(profile: Profile, seed: int, device: torch.device) -> Case:
    """One batch of a profile."""
    rng = random.Random(seed)
    vocab = int(math.exp(rng.uniform(math.log(LEAST_WORDS), math.log(MOST_WORDS))))
    vocab = min(vocab, MOST_LOGITS // profile.longest, MOST_WEIGHTS // profile.dim)
    vocab = {"one": 1, "multiple": -(-vocab // 16) * 16, "any": vocab + (vocab % 16 == 0)}[profile.words]
    room = min(MOST_LOGITS // (profile.longest * vocab), MOST_WEIGHTS // (profile.longest * profile.dim))
    batch = min(int(math.exp(rng.uniform(0, math.log(MOST_TEXTS)))), max(room, 1))
    lengths = draw_lengths(rng, batch, profile.longest)
    tokens = sum(lengths)
    generator = torch.Generator(device).manual_seed(seed)
    if profile.exact:
        rows = exact_rows(tokens, profile.dim, profile.dtype, generator)
        below = rng.choice(BELOW)
        weight, bias = exact_words(vocab, profile.dim, profile.dtype, generator, below=below, bias=profile.bias)
    else:
        sizes = ((tokens, profile.dim), (vocab, profile.dim), (vocab,))
        rows, weight, bias = (torch.randn(s, generator=generator, device=device).to(profile.dtype) for s in sizes)
        weight, bias = weight / 2 ** round(math.log2(profile.dim) / 2), bias if profile.bias else None
    if profile.master:
        weight, bias = weight.float(), None if bias is None else bias.float()
    grad = torch.randn(batch, vocab, generator=generator, device=device).to(profile.dtype)
    grad *= torch.rand(batch, vocab, generator=generator, device=device) > 0.3
    layout, place, shape = draw_layout(rng, profile, lengths, device)
    wanted = rng.choice(WANTED)
    wanted = (*wanted[:2], wanted[2] and profile.bias)
    return Case(profile, lengths, rows, weight, bias, grad, wanted, layout, place, shape)


def draw_layout(
    rng: random.Random, profile: Profile, lengths: list[int], device: torch.device
) -> tuple[dict, Tensor, tuple[int, ...]]:
    """Keywords of the head, where the real rows stand, and the shape of hidden."""
    batch, longest = len(lengths), profile.longest
    if not profile.padded:
        cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=profile.offsets, device=device)
        shape = (sum(lengths) + rng.choice([0, 3]), profile.dim)  # rows past the last text are nobody's
        return {"cu_seqlens": cu, "max_seqlen": longest}, torch.arange(sum(lengths), device=device), shape
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    pattern = rng.choice(["right", "left", "holes"])
    if pattern == "left":
        mask = mask.flip(1)
    elif pattern == "holes":
        mask = mask[:, torch.randperm(longest, generator=torch.Generator().manual_seed(batch))]
    mask = mask.to(device)
    place = mask.flatten().nonzero().flatten()
    return {"attention_mask": mask.long()}, place, (batch, longest, profile.dim)


def expected(case: Case) -> list[Tensor | None]:
    """Output and the gradients by the real rows, weight and bias in float64."""
    leaves = [None if t is None else t.double().requires_grad_() for t in (case.rows, case.weight, case.bias)]
    out = lsr_head_reference(*leaves, case.lengths)
    out = out.log1p() if case.profile.activation == "log1p_log1p" else out
    present = [leaf for leaf in leaves if leaf is not None]
    gradients = iter(torch.autograd.grad(out, present, case.grad.double()))
    return [out.detach(), *(None if leaf is None else next(gradients) for leaf in leaves)]


def run(case: Case, impl: str, place=lambda tensor: tensor) -> list[Tensor | None]:
    """Output and the wanted gradients; ``place`` says where the inputs lie."""
    tensors = (case.hidden(), case.weight, case.bias)
    leaves = [
        None if t is None else place(t).detach().requires_grad_(want)
        for t, want in zip(tensors, case.wanted, strict=True)
    ]
    out = sparton.lsr_head(*leaves, **case.layout, activation=case.profile.activation, impl=impl)
    asked = [leaf for leaf, want in zip(leaves, case.wanted, strict=True) if want]
    grad = place(case.grad.T).T if case.profile.transposed else place(case.grad)
    gradients = iter(torch.autograd.grad(out, asked, grad) if asked else ())
    return [out.detach(), *(next(gradients) if want else None for want in case.wanted)]


def run_on_poison(case: Case) -> list[Tensor | None]:
    """The Triton head with inputs, outputs and workspaces between canaries, each list that is cut from one, too.

    Lists are rounded up to 16 bytes: what is written into that rest isn't seen.
    """
    with poisoned() as memory:
        results = run(case, "triton", memory.place)
        assert memory.holds(results[0]), "the output was not allocated with torch.empty: what else was not?"
    return results


def check(case: Case) -> None:
    """Compares with the naive head and float64, and once more with itself."""
    got = run_on_poison(case)
    again = run_on_poison(case)
    for name, one, two in zip(("output", *NAMES), got, again, strict=True):
        assert one is None or torch.equal(one, two), f"{case}: {name} differs from run to run"
    naive, want = run(case, "naive"), expected(case)
    if got[1] is not None:
        for i, results in enumerate((got, naive)):
            flat = results[1].flatten(0, -2)
            results[1] = flat[case.place]
            assert i or not flat.index_fill(0, case.place, 0).any(), f"{case}: rows of no text got a gradient"
    for name, one, other, truth in zip(("output", *NAMES), got, naive, want, strict=True):
        # Two almost equal logits may change places in float32, in the naive head as in this one.
        doubtful = name in ("hidden", "weight") and not case.profile.exact and case.profile.dtype == torch.float32
        if one is not None and not doubtful:
            assert one.shape == truth.shape and one.dtype == other.dtype
            assert_no_worse(f"{case}: {name}", one, other, truth, EPSILON[case.profile.dtype])


@pytest.mark.parametrize("index", range(PROFILES))
def test_random_batches_on_poisoned_memory(index, device, monkeypatch):
    if not ON_GPU:  # so that the few words of a case are chunks and parts, too
        monkeypatch.setattr(configs, "LEAST_CHUNK_WORDS", 256)
        monkeypatch.setattr(configs, "PART_ENTRIES", 16)
    monkeypatch.setenv("SPARTON_HOPPER", "0" if index % 5 == 4 else "1")  # the plain kernel on a Hopper, too
    profile = Profile.draw(index)
    for i in range(CASES):
        check(draw_case(profile, 1000 * index + i, device))


def test_poison_is_seen_where_nothing_is_written(device):
    with poisoned():
        assert torch.empty(3, 5, device=device).isnan().all()
        assert torch.empty((7,), dtype=torch.bfloat16, device=device).isnan().all()
        assert (torch.empty(4, dtype=torch.int32, device=device) == 0x7F7F7F7F).all()
        assert (torch.empty_like(torch.zeros(2, dtype=torch.uint8, device=device)) == 0x7F).all()


@pytest.mark.parametrize("at", [-1, 5, 5 + GUARD // 4 - 1])
def test_canaries_see_a_write_outside(at, device):
    with pytest.raises(AssertionError, match="before block 0" if at < 0 else "after block 0"), poisoned():
        tensor = torch.empty(5, dtype=torch.float32, device=device).zero_()
        tensor.as_strided((1,), (1,), tensor.storage_offset() + at).fill_(3)


def test_canaries_see_a_write_from_one_list_into_the_next(device):
    with pytest.raises(AssertionError, match="after block 1"), poisoned():
        first, second = torch.empty(12, dtype=torch.int32, device=device).split([4, 8])
        assert len(first) == 4 and len(second) == 8
        first.as_strided((1,), (1,), first.storage_offset() + 4).fill_(3)
