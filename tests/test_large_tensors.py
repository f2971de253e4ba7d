"""The Triton head on sizes past 2^31 elements, at the edges of its tiles, and 20 times over on full-size shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sparton
from sparton.packing import padded_index
from sparton.testing import EPSILON, Inputs, assert_no_worse, compute, truth
from tests.exact_inputs import exact_rows, exact_words
from tests.poison import poisoned

pytest.importorskip("triton")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
NAMES = ("output", "hidden", "weight", "bias")
LIMIT = 2**31
HUGE = {  # texts, shortest and longest, V, D
    "B*V": (8640, 0, 4, 250_002, 64),
    "V*D": (16, 0, 40, 262_500, 8192),
    "V*D, no bulk copies": (16, 0, 40, 262_500, 8190),
    "N*V": (144, 512, 512, 30_522, 64),
    "N*D": (600, 512, 512, 1000, 8192),
}
CHUNK = 2**15  # words whose float64 weight is held at a time


def draw_lengths(batch: int, shortest: int, longest: int, device: torch.device) -> tuple[list[int], Tensor]:
    """Lengths, one of them the longest, and cu_seqlens (B + 1,)."""
    lengths = [*torch.randint(shortest, longest + 1, (batch - 1,)).tolist(), longest]
    return lengths, torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)


def activated(logits: Tensor) -> tuple[Tensor, Tensor]:
    """log1p(relu) of maximal logits and its derivative."""
    positive = logits.relu()
    return positive.log1p(), (logits > 0) / (1 + positive)


def expected_text(rows: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Output (V,) and the gradient by the rows (L, D) of one text in float64, over chunks of the vocabulary."""
    rows, outputs, d_rows = rows.double(), [], torch.zeros(rows.shape, dtype=torch.float64, device=rows.device)
    for first in range(0, len(weight), CHUNK):
        part = slice(first, first + CHUNK)
        words = weight[part].double()
        top, place = (rows @ words.T + bias[part].double()).max(0)
        out, factor = activated(top)
        outputs.append(out)
        share = torch.zeros(len(rows), len(words), dtype=torch.float64, device=rows.device)
        d_rows += share.scatter_(0, place[None], (grad[part].double() * factor)[None]) @ words
    return torch.cat(outputs), d_rows


def expected_words(
    hidden: Tensor, cu_seqlens: Tensor, longest: int, words: Tensor, bias: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, k) and the gradients by k words (k, D) and their bias (k,) in float64."""
    logits = torch.cat([part.double() @ words.double().T for part in hidden.split(CHUNK)]) + bias.double()
    slots, real = padded_index(cu_seqlens, longest)
    top, place = logits[slots].masked_fill(~real[..., None], float("-inf")).max(1)
    out, factor = activated(top)
    g = grad.double() * factor
    row = slots.gather(1, place)
    d_words = torch.stack([g[:, k] @ hidden[row[:, k]].double() for k in range(len(words))])
    return out, d_words, g.sum(0)


def assert_rounded_once(name: str, got: Tensor, want: Tensor, *, sums: bool = True) -> None:
    """Every element within what bfloat16 rounds by, 2^-9, twice; a sum may cancel, so its scale counts too."""
    assert want.any(), f"{name}: nothing active, nothing tested"
    atol = 2**-8 * want.abs().max().item() if sums else 0
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=atol, msg=lambda text: f"{name}: {text}")


@needs_gpu
@pytest.mark.parametrize("product", HUGE)
def test_indices_past_two_to_the_31(product, device):
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB of free GPU memory")
    batch, shortest, longest, vocab, dim = HUGE[product]
    lengths, cu_seqlens = draw_lengths(batch, shortest, longest, device)
    tokens = sum(lengths)
    sizes = {"B*V": (batch, vocab), "V*D": (vocab, dim), "N*V": (tokens, vocab), "N*D": (tokens, dim)}
    rows, columns = sizes[product.partition(",")[0]]
    assert rows * columns > LIMIT
    crossing = LIMIT // columns  # the text, word or row within which the index passes the limit
    generator = torch.Generator(device).manual_seed(1)
    weight, bias = exact_words(vocab, dim, torch.bfloat16, generator, below=1.5)
    hidden = exact_rows(tokens, dim, torch.bfloat16, generator)
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    out = sparton.lsr_head(*leaves, cu_seqlens=cu_seqlens, max_seqlen=longest, impl="triton")
    grad = torch.randn(batch, vocab, generator=generator, device=device, dtype=torch.bfloat16)
    d_hidden, d_weight, d_bias = torch.autograd.grad(out, leaves, grad)
    hidden, weight, bias, out = (tensor.detach() for tensor in (*leaves, out))

    starts = cu_seqlens.tolist()
    texts = {0, batch - 1}
    if product == "B*V":
        texts |= {crossing - 1, crossing, crossing + 1}
    elif product[0] == "N":
        near = next(b for b in range(batch) if starts[b + 1] > crossing)
        texts |= {near - 1, near, near + 1}
    for b in sorted(b for b in texts if lengths[b]):
        part = slice(starts[b], starts[b + 1])
        want, d_rows = expected_text(hidden[part], weight, bias, grad[b])
        assert_rounded_once(f"output of text {b}", out[b], want, sums=False)
        assert_rounded_once(f"gradient by text {b}", d_hidden[part], d_rows)
    words = [0, 1, vocab // 2, vocab - 2, vocab - 1]
    words += [crossing - 1, crossing, crossing + 1] if product.startswith("V*D") else []
    want, d_words, d_sums = expected_words(hidden, cu_seqlens, longest, weight[words], bias[words], grad[:, words])
    assert_rounded_once("output of words", out[:, words], want, sums=False)
    assert_rounded_once("gradient by words", d_weight[words], d_words)
    assert_rounded_once("gradient by their bias", d_bias[words], d_sums)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("longest", [1, 2, 511, 512, 513, 4096, 8192])
def test_lengths_around_tiles_and_far_beyond(longest, dtype, device):
    vocab, dim = 5000, 768
    generator = torch.Generator(device).manual_seed(longest)
    # Logits are exact, so that float32 has no doubt about a maximum either.
    for lengths in ([longest] * 2, [longest, 1, max(longest - 1, 0), 0, longest // 2]):
        hidden = exact_rows(sum(lengths), dim, dtype, generator)
        weight, bias = exact_words(vocab, dim, dtype, generator, below=1.0)
        grad = torch.randn(len(lengths), vocab, generator=generator, device=device).to(dtype)
        inputs = Inputs(*(tensor.double() for tensor in (hidden, weight, bias)), lengths, grad.double())
        results = (compute(inputs, "triton", dtype), compute(inputs, "naive", dtype), truth(inputs))
        for name, got, naive, want in zip(NAMES, *results, strict=True):
            assert_no_worse(f"{name} of {lengths}", got, naive, want, EPSILON[dtype])


@needs_gpu
@pytest.mark.parametrize(
    ("batch", "shortest", "longest", "vocab", "dim", "dtype"),
    [
        (512, 5, 30, 30_522, 768, torch.bfloat16),
        (64, 0, 512, 250_002, 384, torch.float16),
        (16, 1024, 1024, 50_368, 1030, torch.bfloat16),
        (4, 8192, 8192, 30_522, 768, torch.float32),
    ],
)  # fmt: skip
def test_twenty_runs_give_the_same_bits(batch, shortest, longest, vocab, dim, dtype, device):
    lengths, cu_seqlens = draw_lengths(batch, shortest, longest, device)
    shapes = ((sum(lengths), dim), (vocab, dim), (vocab,))
    hidden, weight, bias = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight / dim**0.5, bias - 1)]
    grad = torch.randn(batch, vocab, device=device).to(dtype)
    first = None
    for attempt in range(20):
        with poisoned():  # otherwise a run might read what the one before it has left in the same place
            out = sparton.lsr_head(*leaves, cu_seqlens=cu_seqlens, max_seqlen=longest, impl="triton")
            results = (out.detach(), *torch.autograd.grad(out, leaves, grad))
        first = results if first is None else first
        for name, one, other in zip(NAMES, first, results, strict=True):
            assert torch.equal(one, other), f"{name} of run {attempt}"
    assert all(torch.isfinite(result).all() for result in first)
