"""Outputs and each gradient of every head against float64: never worse than the naive head in the same dtype."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparton
from sparton.ops import lsr_forward
from sparton.testing import EPSILON, assert_no_worse, compute, make_inputs, relative_error, truth
from sparton.tiled import _dense_gradients

NAMES = ("output", "hidden", "weight", "bias")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = {  # lengths, D, V: nothing is a multiple of anything
    "ragged": ([5, 0, 1, 17, 9], 13, 37),
    "one_row": ([1], 24, 131),
    "one_text": ([41], 33, 70),
    "empty_ends": ([0, 3, 0], 16, 20),
    "all_empty": ([0, 0], 8, 9),
    "one_word": ([4, 2], 5, 1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", ["tiled", "triton"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_no_worse_than_naive(shape, impl, dtype, bias, device):
    lengths, dim, vocab = SHAPES[shape]
    inputs = make_inputs(lengths, dim, vocab, bias=bias, dtype=dtype, device=device)
    expected = truth(inputs)
    results = zip(NAMES, compute(inputs, impl, dtype), compute(inputs, "naive", dtype), expected, strict=True)
    for name, got, naive, want in results:
        if want is not None:
            assert got.shape == want.shape and got.dtype == dtype
            assert_no_worse(name, got, naive, want, EPSILON[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", [[20], [40, 300]], ids=["narrow tile", "wide tile"])
def test_wider_outputs_of_16_bit_operands(lengths, dtype, device):
    """The low bits of a logit hold the place of its row: at most 8, which makes it smaller by less than 2^-15."""
    inputs = make_inputs(lengths, 24, 37, dtype=dtype, device=device)
    leaves = [leaf.detach() for leaf in inputs.leaves(dtype)]
    longest = max(lengths)
    out, exact = (
        sparton.lsr_head(
            *leaves, cu_seqlens=inputs.cu_seqlens, max_seqlen=longest, out_dtype=torch.float32, impl=impl
        ).double().expm1()
        for impl in ("triton", "tiled")
    )  # fmt: skip
    assert exact.count_nonzero() > 20
    smaller = ((exact - out) / exact)[exact > 0]
    assert -1e-5 < smaller.min() and smaller.max() < 2**-15 + 1e-5


@pytest.mark.parametrize("impl", ["tiled", "triton"])
@pytest.mark.parametrize("activation, normal", [("log1p", 16_383), ("log1p_log1p", 1_900)])
def test_the_factor_of_16_bit_operands(activation, normal, impl, device):
    """Stored in float16, it keeps 2^-11 while it is a normal number, 2^-25 in absolute terms when logits are larger."""
    hidden = torch.ones(1, 16, dtype=torch.bfloat16, device=device)
    bias = torch.tensor([0.5, 7, 300, 1_899, normal, 1e5, 1e7], device=device)
    weight, cu = torch.zeros(len(bias), 16, dtype=torch.bfloat16, device=device), torch.tensor([0, 1], device=device)
    _, factor, _ = lsr_forward(hidden, weight, bias, cu, 1, activation, torch.bfloat16, torch.bfloat16, impl)
    logit = bias.double()
    exact = 1 / (1 + logit)
    if activation == "log1p_log1p":
        exact = exact / (1 + logit.log1p())
    error = (factor[0].double() - exact).abs()
    assert (error <= 2**-11 * exact * (1 + 2**-6))[logit <= normal].all()
    assert (error <= 2**-25 * (1 + 2**-6))[logit > normal].all()


@pytest.mark.parametrize("impl", ["naive", "tiled"])
def test_float64_is_exact(impl, device):
    inputs = make_inputs(*SHAPES["ragged"], dtype=torch.float64, device=device)
    for name, got, want in zip(NAMES, compute(inputs, impl, torch.float64), truth(inputs), strict=True):
        assert relative_error(got, want) < 1e-13, name


def test_gradcheck_of_the_tiled_head():
    inputs = make_inputs([4, 0, 3], 5, 7, dtype=torch.float64)
    cu = inputs.cu_seqlens
    torch.autograd.gradcheck(
        lambda h, w, b: sparton.lsr_head(h, w, b, cu_seqlens=cu, impl="tiled"), inputs.leaves(torch.float64)
    )


@pytest.mark.parametrize("impl", ["naive", "tiled", "triton"])
def test_values_written_out(impl, device):
    hidden = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [9.0, 9.0]]], device=device)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]], device=device)
    bias = torch.tensor([0.0, 1.0, 0.5], device=device)
    mask = torch.tensor([[1, 1, 0]], device=device)
    out = sparton.lsr_head(hidden, weight, bias, mask, impl=impl)
    torch.testing.assert_close(out, torch.tensor([[2.0, 4.0, 1.0]], device=device).log())
    twice = sparton.lsr_head(hidden, weight, bias, mask, impl=impl, activation="log1p_log1p")
    torch.testing.assert_close(twice, out.log1p())


@pytest.mark.parametrize("impl", ["tiled", "triton"])
def test_double_log_gradients(impl, device):
    inputs = make_inputs([6, 2], 16, 19, dtype=torch.float32, device=device)

    def run(name, dtype):
        leaves = inputs.leaves(dtype)
        out = sparton.lsr_head(*leaves, cu_seqlens=inputs.cu_seqlens, impl=name, activation="log1p_log1p")
        return [out, *torch.autograd.grad(out, leaves, inputs.grad.to(dtype))]

    for got, naive, want in zip(
        run(impl, torch.float32), run("naive", torch.float32), run("naive", torch.float64), strict=True
    ):
        assert_no_worse(impl, got, naive, want, EPSILON[torch.float32])


@pytest.mark.parametrize("impl", ["naive", "tiled", "triton"])
@pytest.mark.parametrize("pattern", ["right", "left", "holes", "none_left"])
def test_padded_equals_packed(impl, pattern, device):
    batch, seqlen, dim, vocab = 3, 11, 12, 23
    mask = torch.zeros(batch, seqlen, dtype=torch.long)
    for b, length in enumerate((11, 4, 0 if pattern == "none_left" else 7)):
        if pattern == "left":
            mask[b, seqlen - length :] = 1
        elif pattern == "holes":
            mask[b, torch.randperm(seqlen)[:length]] = 1
        else:
            mask[b, :length] = 1
    hidden = torch.randn(batch, seqlen, dim)
    weight, bias = torch.randn(vocab, dim), torch.randn(vocab) - 2
    hidden, weight, bias, mask = (t.to(device) for t in (hidden, weight, bias, mask))
    packed, counts = hidden[mask.bool()], mask.sum(1)
    cu = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    padded = sparton.lsr_head(hidden, weight, bias, mask, impl=impl)
    torch.testing.assert_close(padded, sparton.lsr_head(packed, weight, bias, cu_seqlens=cu, impl=impl))
    torch.testing.assert_close(padded, sparton.lsr_head(hidden, weight, bias, mask.bool(), impl=impl))


def test_dense_gradients_are_the_sparse_ones(device):
    """What the tiled head does on a GPU, on any device."""
    inputs = make_inputs([5, 0, 3], 8, 21, device=device)
    hidden, weight, bias = (t.float() for t in (inputs.hidden, inputs.weight, inputs.bias))
    cu, grad = inputs.cu_seqlens, inputs.grad.float()
    _, factor, positions = lsr_forward(hidden, weight, bias, cu, 5, "log1p", torch.float32, torch.float32, "tiled")
    rows = cu[:-1, None].long() + positions.long()
    for got, want in zip(
        _dense_gradients(grad * factor, rows, hidden, weight, cu[-1], (True, True)), truth(inputs)[1:3], strict=True
    ):
        torch.testing.assert_close(got, want.float())


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    dim=st.integers(1, 20),
    vocab=st.integers(1, 40),
    shift=st.sampled_from([-6.0, -1.0, 2.0]),
    impl=st.sampled_from(["tiled", "triton"]),
)
def test_any_shape(lengths, dim, vocab, shift, impl):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = make_inputs(lengths, dim, vocab, shift=shift, seed=dim + vocab, device=device)
    for name, got, want in zip(NAMES, compute(inputs, impl, torch.float32), truth(inputs), strict=True):
        assert relative_error(got, want) < 1e-5, name
