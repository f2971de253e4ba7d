"""The next gradient kernels: chunks, ranges, long rows and any activity, on small constants; bit equality."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from sparton.kernels import configs  # noqa: E402
from sparton.kernels.gradients import preview_backward  # noqa: E402

ALL = (True, True, True)


def saved(lengths, vocab, dim, device, *, active=0.5, skewed=0.0, dtype=torch.float32, seed=0):
    """What a forward pass might have saved, and an upstream gradient of which a third is zero."""
    generator = torch.Generator().manual_seed(seed)
    batch, tokens = len(lengths), sum(lengths)
    shape = (batch, vocab)
    length = torch.tensor(lengths)[:, None].clamp_min(1)
    positions = (torch.rand(shape, generator=generator) * length).long().minimum(length - 1)
    positions[torch.rand(shape, generator=generator) < skewed] = 0
    factor = torch.rand(shape, generator=generator) * (torch.rand(shape, generator=generator) < active)
    factor[torch.tensor(lengths) == 0] = 0
    grad = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) > 0.33)
    hidden, weight = (torch.randn(n, dim, generator=generator).to(dtype) for n in (tokens, vocab))
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    bias = torch.zeros(vocab, dtype=dtype)
    tensors = (grad.to(dtype), factor, positions.short(), hidden, weight, bias, cu_seqlens)
    return [tensor.to(device) for tensor in tensors]


def expected(grad, factor, positions, hidden, weight, bias, cu_seqlens):
    g = torch.where(factor > 0, grad.double() * factor.double(), 0)
    rows = cu_seqlens[:-1, None].long() + positions.long()
    d_hidden = torch.zeros(hidden.shape, dtype=torch.float64, device=hidden.device)
    d_weight = torch.zeros(weight.shape, dtype=torch.float64, device=hidden.device)
    for b in range(len(g)):
        active = g[b] != 0
        d_hidden.index_add_(0, rows[b][active], g[b][active, None] * weight[active].double())
        d_weight[active] += g[b][active, None] * hidden[rows[b][active]].double()
    return d_hidden, d_weight, g.sum(0)


@pytest.mark.parametrize(
    ("lengths", "vocab", "dim", "settings"),
    [
        ([5, 1, 9], 300, 24, {}),
        ([5, 0, 9], 300, 24, {"skewed": 0.8}),
        ([40, 3], 500, 13, {"active": 1.0, "skewed": 1.0}),
        ([3] * 40, 70, 16, {"active": 0.02}),
        ([2] * 300, 20, 8, {}),
        ([4, 4], 200, 16, {"active": 0.0}),
        ([7], 1, 1030, {}),
    ],
)
def test_against_float64(lengths, vocab, dim, settings, device, monkeypatch):
    for name, value in {"CHUNK_WORDS": 256, "PART_ENTRIES": 32, "WORKSPACE": 4 * vocab * max(2, len(lengths) // 3)}.items():
        monkeypatch.setattr(configs, name, value)
    tensors = saved(lengths, vocab, dim, device, **settings)
    got = preview_backward(*tensors, ALL)
    for name, value, want in zip(("hidden", "weight", "bias"), got, expected(*tensors), strict=True):
        torch.testing.assert_close(value.double(), want, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for value, again in zip(got, preview_backward(*tensors, ALL), strict=True):
        assert torch.equal(value, again)


@pytest.mark.parametrize("wanted", range(3))
def test_each_gradient_alone(wanted, device):
    tensors = saved([4, 6], 90, 16, device)
    got = preview_backward(*tensors, tuple(i == wanted for i in range(3)))
    assert [value is not None for value in got] == [i == wanted for i in range(3)]
    torch.testing.assert_close(got[wanted].double(), expected(*tensors)[wanted], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter computes what is then left out
def test_what_is_inactive_has_no_effect(device):
    grad, factor, positions, hidden, *rest = saved([3, 5], 60, 8, device)
    grad[factor == 0] = float("inf")
    hidden[7] = float("nan")  # a row that nobody points to
    positions[1] = positions[1].clamp_max(3)
    got = preview_backward(grad, factor, positions, hidden, *rest, ALL)
    assert all(torch.isfinite(value).all() for value in got)
    assert not got[0][7].any()


def test_an_expanded_gradient(device):
    _, *rest = saved([3, 5], 60, 8, device)
    grad = torch.ones((), device=device).expand(2, 60)
    for a, b in zip(preview_backward(grad, *rest, ALL), preview_backward(grad.contiguous(), *rest, ALL), strict=True):
        assert torch.equal(a, b)
