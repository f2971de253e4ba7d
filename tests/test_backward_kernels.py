"""The gradient kernels on small constants: chunks, ranges, long rows, any activity and dtype; the same bits twice."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from sparton.kernels import configs  # noqa: E402
from sparton.kernels.backward import triton_backward  # noqa: E402
from sparton.kernels.backward_hidden import _sort  # noqa: E402
from sparton.testing import relative_error  # noqa: E402
from sparton.tiled import position_dtype  # noqa: E402

NAMES = ("hidden", "weight", "bias")


def saved(lengths, vocab, dim, device, *, active=0.5, skewed=0.0, dtype=torch.float32, max_seqlen=None, seed=0):
    """What a forward pass might have saved, with an upstream gradient of which a third is zero."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), vocab)
    length = torch.tensor(lengths)[:, None]
    last = (length - 1).clamp_min(0)
    positions = (torch.rand(shape, generator=generator) * length).long().minimum(last)
    frequent = (positions % 2).minimum(last)  # the first two rows of a text win most
    positions = torch.where(torch.rand(shape, generator=generator) < skewed, frequent, positions)
    factor = torch.rand(shape, generator=generator) * (torch.rand(shape, generator=generator) < active)
    factor = factor.masked_fill(length == 0, 0)
    grad = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) > 0.33)
    hidden, weight, bias = (torch.randn(*s, generator=generator) for s in ((sum(lengths), dim), (vocab, dim), (vocab,)))
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
    grad, hidden, weight, bias = (tensor.to(device, dtype) for tensor in (grad, hidden, weight, bias))
    factor = factor.to(device, torch.float32 if dtype == torch.float32 else torch.float16)
    positions = positions.to(device, position_dtype(max_seqlen or max(lengths)))
    return [grad, factor, positions, hidden, weight, bias, cu_seqlens, max_seqlen or max(lengths)]


def expected(grad, factor, positions, hidden, weight, bias, cu_seqlens, _):
    """The three gradients in float64, entry by entry."""
    g = torch.where(factor > 0, grad.double() * factor.double(), 0)
    rows = cu_seqlens[:-1, None].long() + positions.long()
    d_hidden, d_weight = torch.zeros_like(hidden, dtype=torch.float64), torch.zeros_like(weight, dtype=torch.float64)
    for b in range(len(g)):
        word = g[b].nonzero().flatten()
        d_hidden.index_add_(0, rows[b, word], g[b, word, None] * weight[word].double())
        d_weight[word] += g[b, word, None] * hidden[rows[b, word]].double()
    return d_hidden, d_weight, g.sum(0)


def check(tensors, bound=1e-6):
    """Compares with float64, runs again for the same bits and returns them."""
    got = triton_backward(*tensors)
    for name, value, tensor, want in zip(NAMES, got, tensors[3:6], expected(*tensors), strict=True):
        assert value.dtype == tensor.dtype and value.shape == tensor.shape
        assert relative_error(value, want) <= bound, name
    assert all(torch.equal(a, b) for a, b in zip(got, triton_backward(*tensors), strict=True))
    return got


@pytest.fixture
def small(monkeypatch):
    """Constants so small that a few hundred words make many chunks, parts and ranges."""
    for name, value in {"LEAST_CHUNK_WORDS": 256, "PART_ENTRIES": 16, "WORDS": 2}.items():
        monkeypatch.setattr(configs, name, value)
    return monkeypatch


@pytest.mark.parametrize(
    ("lengths", "vocab", "dim", "settings"),
    [
        ([5, 1, 9], 300, 24, {}),
        ([5, 0, 9, 0], 300, 48, {"skewed": 0.9, "active": 1.0}),
        ([1], 257, 8, {"active": 1.0}),  # one row wins every word
        ([7, 3], 70, 1, {"active": 0.02}),
        ([4, 4], 100, 13, {"active": 0.0}),
        ([6], 1, 40, {"active": 1.0}),
    ],
)
def test_against_float64(small, lengths, vocab, dim, settings, device):
    check(saved(lengths, vocab, dim, device, **settings))


@pytest.mark.parametrize("skewed", [0.0, 0.9])
def test_ranges_of_texts_and_words(small, skewed, device):
    tensors = saved([4, 0, 7, 1, 9], 150, 16, device, skewed=skewed)
    whole = triton_backward(*tensors)
    small.setattr(configs, "WORKSPACE", 2 * (4 * 150 + 4 * 10 * 16))  # two texts at a time
    assert all(torch.equal(a, b) for a, b in zip(whole, check(tensors), strict=True))
    small.setattr(configs, "WORKSPACE", 1)  # one text, one word
    check(saved([4, 2, 7], 12, 8, device, skewed=skewed))


@pytest.mark.parametrize("segment", [32, 64, 256])
@pytest.mark.parametrize("skewed", [0.0, 0.5])
def test_rows_that_win_most_come_first(small, segment, skewed, device):
    """By segments of neighbouring rows: the first ones of all, then the second ones; what is long has parts instead."""
    small.setattr(configs, "SEGMENT", segment)
    lengths = [70, 1, 0, 33]
    tensors = saved(lengths, 600, 8, device, skewed=skewed)
    grad, factor, positions, *_, cu_seqlens, _ = tensors
    launched = sum(lengths) + 20  # to the end of hidden
    found = _sort(grad, factor, positions, cu_seqlens, 0, 4, sum(lengths), launched)
    first = torch.tensor([0, 70, 71, 71], device=device)[:, None]
    won = torch.bincount((first + positions)[(factor > 0) & (grad != 0)], minlength=launched)
    whole = won.masked_fill(won >= 32, 0).tolist()  # parts have 16
    assert whole != won.tolist()  # the only row of a text is long
    segments = [range(begin, min(begin + segment, launched)) for begin in range(0, launched, segment)]
    ordered = [sorted(rows, key=lambda row: -whole[row]) for rows in segments]
    want = [rows[rank] for rank in range(segment) for rows in ordered if rank < len(rows)]
    assert found.rows[:launched].tolist() == want
    spans = found.spans.tolist()
    rows = torch.tensor(want, device=device)
    counts = torch.where(won >= 32, -1, won)[rows].tolist()
    assert [span >> 32 for span in spans[found.num_parts :]] == counts
    parts = [(span & 2**32 - 1, span >> 32) for span in spans[: found.num_parts] if span >= 0]
    begins = won.cumsum(0) - won
    want = [(int(begins[row]) + 16 * part, 16 if part < n // 16 - 1 else n - 16 * part)
            for row, n in enumerate(won.tolist()) if n >= 32 for part in range(n // 16)]  # fmt: skip
    assert parts == want


def test_rows_of_no_text_are_zero_whatever_the_ranges(small, device):
    """Each range of texts goes through its own rows alone; the last one through all that follow as well."""
    tensors = saved([4, 0, 7, 1, 9], 150, 16, device)
    tensors[3] = torch.cat([tensors[3], torch.full((70, 16), float("nan"), device=device)])
    whole = triton_backward(*tensors)
    assert not whole[0][21:].any()
    for workspace in (1, 2 * (4 * 150 + 4 * 10 * 16)):
        small.setattr(configs, "WORKSPACE", workspace)
        assert all(torch.equal(a, b) for a, b in zip(whole, triton_backward(*tensors), strict=True))


def test_upstream_gradients_far_apart(device):
    """A stride of 2^28: offsets within a block of texts would not fit 32 bits."""
    grad, *rest = saved([2] * 9, 8, 8, device, dtype=torch.bfloat16)
    apart = torch.empty(2**28 * 8 + 8, dtype=grad.dtype, device=device).as_strided(grad.shape, (2**28, 1))
    apart.copy_(grad)
    for a, b in zip(triton_backward(apart, *rest), triton_backward(grad, *rest), strict=True):
        assert torch.equal(a, b)


def test_a_bound_below_the_lengths_writes_nothing_elsewhere(device):
    """It can't be checked without a wait for the device; what it costs is the gradient of rows that are not there."""
    *tensors, longest = saved([40, 30], 300, 8, device, active=1.0)
    got, want = triton_backward(*tensors, 20), triton_backward(*tensors, longest)
    assert torch.equal(got[1], want[1]) and torch.equal(got[2], want[2])


def test_chunks_grow_where_the_table_would_not_fit(small, device):
    assert configs.chunk_words(800, 10) == 256
    small.setattr(configs, "TABLE", 4 * 10 * 2)
    assert configs.chunk_words(800, 10) == 512
    check(saved([3, 7], 800, 8, device, skewed=0.5))


def test_many_texts_take_the_vocabulary_in_sixteen_ranges(small, device):
    assert configs.listed_words(250_002, 32) == 250_002
    assert configs.listed_words(250_002, 512) == 22_528  # what fits WORKSPACE
    assert configs.listed_words(250_002, 20_000) == 15_626
    assert configs.listed_words(250_002, 10**6) * 10**6 < 2**31
    tensors = saved([2] * 20, 150, 8, device)
    whole = triton_backward(*tensors)
    small.setattr(configs, "WORKSPACE", 1)
    assert configs.listed_words(150, 20) == 10
    assert all(torch.equal(a, b) for a, b in zip(whole, check(tensors), strict=True))


@pytest.mark.parametrize("batch", [33, 257])
def test_many_texts(batch, device):
    check(saved([2] * batch, 5, 8, device))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter has no limit")
def test_more_texts_than_programs_on_an_axis(device):
    grad, factor, positions, hidden, weight, *rest = saved([1] * 70_000, 3, 16, device)
    got = triton_backward(grad, factor, positions, hidden, weight, *rest)[0]
    assert relative_error(got, (grad.double() * factor.double()) @ weight.double()) < 1e-6


@pytest.mark.parametrize("longest", [300, 8192, 40000])
def test_long_texts_and_positions_for_longer_ones(longest, device):
    """More rows than a histogram has bins; short texts whose bound is far above their lengths."""
    check(saved([min(longest, 1100), 3], 100, 8, device, max_seqlen=longest))
    check(saved([5, 3], 40, 8, device, max_seqlen=longest))


@pytest.mark.parametrize("dim", [768, 1030, 2056])
def test_wide_rows(dim, device):
    check(saved([7, 4], 12, dim, device))


# The interpreter cuts bfloat16 off where a GPU rounds: twice the error.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 5e-3), (torch.float16, 4e-4)])
def test_sixteen_bits_round_once(small, dtype, bound, device):
    check(saved([9, 4], 300, 24, device, dtype=dtype, skewed=0.5), bound)


def test_master_weights(device):
    grad, factor, positions, hidden, weight, *rest = saved([9, 4], 90, 24, device, dtype=torch.bfloat16)
    tensors = [grad, factor, positions, hidden.float(), weight.float(), *rest]
    got = triton_backward(*tensors)
    for value, want in zip(got[:2], expected(*tensors)[:2], strict=True):
        assert value.dtype == torch.float32 and relative_error(value, want) < 1e-6


@pytest.mark.parametrize("need", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3])
def test_only_what_is_needed(need, device):
    tensors = saved([4, 6], 90, 16, device)
    got, whole = triton_backward(*tensors, need), triton_backward(*tensors)
    for value, all_three, wanted in zip(got, whole, need, strict=True):
        assert torch.equal(value, all_three) if wanted else value is None


def test_zero_upstream_gradients(small, device):
    grad, *rest = saved([4, 6, 3], 300, 16, device, active=1.0)
    grad[1] = 0
    grad[:, 100:200] = 0
    check([grad, *rest])
    for value in triton_backward(torch.zeros_like(grad), *rest):
        assert not value.any()


def test_what_is_inactive_has_no_effect(device):
    grad, factor, positions, hidden, weight, bias, *lengths = saved([3, 5, 4], 60, 8, device)
    grad[factor == 0] = float("inf")
    grad[0, 0], factor[0, 0] = float("nan"), 0
    positions[1].clamp_(max=3)
    hidden[7] = float("nan")  # the row that nobody points to
    longer = torch.cat([hidden, torch.full((4, 8), float("nan"), device=device)])  # and rows of no text
    got = triton_backward(grad, factor, positions, longer, weight, bias, *lengths)
    assert all(torch.isfinite(value).all() for value in got)
    assert not got[0][7].any() and not got[0][12:].any()


def test_a_gradient_that_overflowed_reaches_its_owners(device):
    grad, factor, *rest = saved([3, 5], 60, 8, device)
    grad[0, 4], factor[0, 4] = float("nan"), 0.5
    d_hidden, d_weight, d_bias = triton_backward(grad, factor, *rest)
    assert d_hidden.isnan().any() and d_weight[4].isnan().all() and d_bias[4].isnan()
    assert torch.isfinite(d_weight[5:]).all()


def test_strides(device):
    grad, factor, positions, hidden, weight, bias, cu, longest = saved([3, 5], 60, 8, device)
    whole = triton_backward(grad, factor, positions, hidden, weight, bias, cu, longest)
    for other in ((hidden.T.contiguous().T, weight), (hidden, torch.cat([weight, weight], 1)[:, :8])):
        got = triton_backward(grad.T.contiguous().T, factor, positions, *other, bias, cu.long(), longest)
        assert all(torch.equal(a, b) for a, b in zip(whole, got, strict=True))
    one = torch.ones((), device=device)
    for a, b in zip(
        triton_backward(one.expand(2, 60), factor, positions, hidden, weight, bias, cu, longest),
        triton_backward(one.expand(2, 60).double(), factor, positions, hidden, weight, bias, cu, longest),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("lengths", "vocab"), [([], 9), ([0, 0], 9), ([3], 0)])
def test_nothing_to_sum(lengths, vocab, device):
    tensors = saved(lengths or [1], vocab, 8, device)
    if not lengths:
        tensors = [t[:0] for t in tensors[:4]] + tensors[4:6] + [tensors[6][:1], 1]
    for value, tensor in zip(triton_backward(*tensors), tensors[3:6], strict=True):
        assert value.shape == tensor.shape and not value.any()
