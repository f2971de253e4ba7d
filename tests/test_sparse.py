"""encode_sparse against the dense head: thresholds, top-k and its ties, layouts, dtypes, blocks, bad input."""

from __future__ import annotations

import pytest
import torch

import sparton
import sparton.sparse
from sparton.sparse import compress
from sparton.testing import make_inputs

LENGTHS = [5, 0, 1, 9, 3]


def dense(vectors: sparton.SparseVectors, vocab: int) -> torch.Tensor:
    """(B, V), after checking what CSR promises."""
    crow, indices, values = vectors
    assert (crow.dtype, indices.dtype) == (torch.int64, torch.int32)
    assert crow.device == indices.device == values.device and not values.requires_grad
    assert crow[0] == 0 and crow[-1] == len(indices) == len(values)
    rep = torch.zeros(len(crow) - 1, vocab, dtype=values.dtype, device=values.device)
    for b, (start, stop) in enumerate(zip(crow[:-1].tolist(), crow[1:].tolist(), strict=True)):
        assert (indices[start:stop].diff() > 0).all()
        rep[b, indices[start:stop].long()] = values[start:stop]
    return rep


def reference(rep: torch.Tensor, top_k: int | None, threshold: float) -> torch.Tensor:
    """The same choice by Python's stable sort."""
    wanted = torch.zeros_like(rep)
    for row, out in zip(rep.detach(), wanted, strict=True):
        order = sorted(range(len(row)), key=lambda v: -row[v].item())
        chosen = [v for v in order[: len(row) if top_k is None else top_k] if row[v] > threshold]
        out[chosen] = row[chosen]
    return wanted


@pytest.fixture(params=[None, 100], ids=["one_block", "blocks_of_two"])
def blocks(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setattr(sparton.sparse, "BLOCK_ELEMENTS", request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("top_k", "threshold"), [(None, 0.0), (None, 0.7), (4, 0.0), (4, 0.7), (1000, 0.0)])
def test_equals_the_dense_head(dtype, top_k, threshold, blocks, device):
    inputs = make_inputs(LENGTHS, 16, 50, dtype=dtype, device=device)
    # Few distinct values: every sum is exact, whatever the shape of the product, and there are ties.
    hidden, weight, bias = (torch.round(leaf.detach() * 2).div(2).requires_grad_() for leaf in inputs.leaves(dtype))
    cu, choice = inputs.cu_seqlens, {"top_k": top_k, "threshold": threshold}
    expected = reference(sparton.lsr_head(hidden, weight, bias, cu_seqlens=cu, impl="tiled"), top_k, threshold)
    packed = sparton.encode_sparse(hidden, weight, bias, cu_seqlens=cu, max_seqlen=9, impl="tiled", **choice)
    assert packed.values.dtype == dtype
    assert torch.equal(dense(packed, 50), expected)
    mask = torch.arange(9, device=device) < torch.tensor(LENGTHS, device=device)[:, None]
    padded = torch.full((len(LENGTHS), 9, 16), float("nan"), dtype=dtype, device=device)
    padded[mask] = hidden.detach()
    from_padded = sparton.encode_sparse(padded, weight, bias, mask, impl="tiled", **choice)
    assert torch.equal(dense(from_padded, 50), expected)


def test_default_implementation_and_activation(device):
    inputs = make_inputs([3, 4], 8, 30, device=device)
    hidden, weight, bias = inputs.leaves(torch.float32)
    kwargs = {"cu_seqlens": inputs.cu_seqlens, "activation": "log1p_log1p"}
    got = sparton.encode_sparse(hidden, weight, bias, **kwargs)
    assert torch.equal(dense(got, 30), sparton.lsr_head(hidden, weight, bias, **kwargs))


@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 5])
def test_a_tie_goes_to_the_lower_word(top_k):
    rep = torch.tensor([[1.0, 2.0, 1.0, 0.0, 1.0], [0.0] * 5, [3.0] * 5])
    assert torch.equal(dense(compress(rep, top_k=top_k), 5), reference(rep, top_k, 0.0))


def test_no_text_and_no_active_word(device, blocks):
    weight, bias = torch.ones(50, 4, device=device), torch.full((50,), -9.0, device=device)
    none = sparton.encode_sparse(torch.ones(0, 3, 4, device=device), weight, bias, top_k=2)
    assert none.crow.tolist() == [0] and len(none.indices) == 0
    cu = torch.zeros(1, dtype=torch.int32, device=device)
    packed = sparton.encode_sparse(torch.ones(0, 4, device=device), weight, bias, cu_seqlens=cu)
    assert packed.crow.tolist() == [0] and packed.values.dtype == torch.float32
    quiet = sparton.encode_sparse(torch.ones(3, 2, 4, device=device), weight, bias, top_k=2)
    assert quiet.crow.tolist() == [0, 0, 0, 0]


def test_a_nan_stays_visible():
    rep = torch.tensor([[0.0, float("nan"), 1.0, 2.0]])
    assert compress(rep).indices.tolist() == compress(rep, top_k=3).indices.tolist() == [1, 2, 3]


def test_bad_input():
    hidden, weight = torch.ones(2, 3, 4), torch.ones(7, 4)
    for name, value in (("top_k", 0), ("threshold", -0.5), ("threshold", float("nan")), ("threshold", float("inf"))):
        with pytest.raises(ValueError, match=f"{name}: expected .*got {value}"):
            sparton.encode_sparse(hidden, weight, **{name: value})
        with pytest.raises(ValueError, match=f"{name}: expected .*got {value}"):
            compress(torch.ones(2, 3), **{name: value})
    with pytest.raises(ValueError, match=r"weight: expected \(V, D\)"):
        sparton.encode_sparse(hidden, torch.ones(7, 5))
    with pytest.raises(ValueError, match="attention_mask: expected"):
        sparton.encode_sparse(hidden, weight, None, torch.ones(2, 2))
