"""What the head promises beside its values: layouts, dtypes, padding, determinism, compilation, memory, errors."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sparton
from sparton.functional import ACTIVATIONS, why_not_triton
from sparton.ops import _compute_backward, _compute_forward, lsr_backward, lsr_forward
from sparton.testing import EPSILON, assert_no_worse, compute, make_inputs, truth

OWN = ("tiled", "triton")
ALL = ("naive", *OWN)
META = torch.empty(0, device="meta")
HEADS = (sparton.NaiveHead, sparton.CompiledHead, sparton.TiledHead, sparton.SpartonHead)


def _padded(device, batch=2, seqlen=7, dim=12, vocab=21):
    hidden, weight = torch.randn(batch, seqlen, dim, device=device), torch.randn(vocab, dim, device=device)
    return hidden, weight, torch.randn(vocab, device=device)


def _run(impl, hidden, weight, bias, mask=None, grad=None):
    leaves = [t.detach().requires_grad_() for t in (hidden, weight, bias)]
    out = sparton.lsr_head(*leaves, mask, impl=impl)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out) if grad is None else grad)]


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_padding_does_not_leak(impl, poison, device):
    hidden, weight, bias = _padded(device)
    mask = torch.tensor([[1, 1, 0, 1, 0, 0, 0], [0] * 7], device=device)
    clean = _run(impl, hidden.masked_fill(mask[..., None] == 0, 0), weight, bias, mask)
    dirty = _run(impl, hidden.masked_fill(mask[..., None] == 0, poison), weight, bias, mask)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.isfinite(b).all()
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", ALL)
def test_tokens_are_excluded_by_the_mask_or_by_their_rows(impl, device):
    hidden, weight, bias = _padded(device)
    lengths = torch.tensor([7, 4], device=device)
    place = torch.arange(7, device=device)
    pooled = (place > 0) & (place < lengths[:, None] - 1)  # without [CLS], [SEP] and the padding
    grad = torch.randn(2, 21, device=device)
    leaves = [t.double().requires_grad_() for t in (hidden, weight, bias)]
    logits = (leaves[0] @ leaves[1].T + leaves[2]).masked_fill(~pooled[..., None], -torch.inf)
    want = logits.amax(1).relu().log1p()
    expected = [want.detach(), *torch.autograd.grad(want, leaves, grad.double())]

    got = _run(impl, hidden, weight, bias, pooled.long(), grad)
    rows, cu_seqlens = hidden[pooled], torch.tensor([0, 5, 7], device=device)
    leaves = [t.detach().requires_grad_() for t in (rows, weight, bias)]
    out = sparton.lsr_head(*leaves, cu_seqlens=cu_seqlens, impl=impl)
    packed = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    assert got[1][~pooled].eq(0).all()
    packed[1] = torch.zeros_like(hidden).index_put((pooled,), packed[1])
    for a, b, c in zip(got, packed, expected, strict=True):
        torch.testing.assert_close(a, c.float())
        torch.testing.assert_close(b, c.float())


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter computes with numpy
@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_overflow_of_a_real_row_reaches_the_output(impl, dtype, device):
    hidden = torch.ones(2, 20, 4, dtype=dtype, device=device)
    hidden[1, 7, 2] = float("inf")  # whoever scales a fp16 loss must see it
    out = sparton.lsr_head(hidden, torch.ones(3, 4, dtype=dtype, device=device), None, impl=impl)
    assert torch.isfinite(out[0]).all() and not torch.isfinite(out[1]).any()


@pytest.mark.parametrize("impl", OWN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("seqlen", [5, 40, 700])  # the narrow tile, texts that fill a wide one, texts of several
def test_an_infinite_logit_gives_infinity(impl, dtype, activation, seqlen, device):
    hidden, weight, bias = (t.to(dtype) for t in _padded(device, seqlen=seqlen))
    bias[::3], bias[1::3] = torch.inf, -torch.inf
    naive, out = (sparton.lsr_head(hidden, weight, bias, activation=activation, impl=name) for name in ("naive", impl))
    assert naive[:, ::3].isinf().all() and torch.isfinite(naive[:, 2::3]).all()
    torch.testing.assert_close(out, naive)


@pytest.mark.parametrize("impl", OWN)
def test_rows_past_the_last_sequence_are_not_read(impl, device):
    inputs = make_inputs([3, 0, 4], 8, 11, device=device)
    hidden, weight, bias = inputs.leaves(torch.float32)
    longer = torch.cat([hidden.detach(), torch.full((5, 8), float("nan"), device=device)]).requires_grad_()
    out = sparton.lsr_head(longer, weight, bias, cu_seqlens=inputs.cu_seqlens, impl=impl)
    got = torch.autograd.grad(out, [longer, weight], inputs.grad.float())
    want = truth(inputs)
    torch.testing.assert_close(out, want[0].float())
    torch.testing.assert_close(got[0], torch.cat([want[1].float(), torch.zeros(5, 8, device=device)]))
    torch.testing.assert_close(got[1], want[2].float())


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8])
def test_every_number_but_zero_keeps_a_token(impl, dtype, device):
    hidden, weight, bias = _padded(device)
    mask = torch.tensor([[2, 0, 1, 0, 1, 1, 127], [0] * 7], device=device)
    for a, b in zip(
        _run(impl, hidden, weight, bias, mask.to(dtype)), _run(impl, hidden, weight, bias, mask > 0), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", ALL)
def test_a_tie_goes_to_the_lowest_position(impl, device):
    hidden = torch.ones(1, 5, 4, device=device, requires_grad=True)
    weight = torch.ones(3, 4, device=device)
    (grad,) = torch.autograd.grad(sparton.lsr_head(hidden, weight, impl=impl).sum(), hidden)
    assert (grad[0, 0] > 0).all() and (grad[0, 1:] == 0).all()


@pytest.mark.parametrize("impl", ALL)
def test_non_contiguous_inputs_and_expanded_gradients(impl, device):
    hidden, weight, bias = _padded(device)
    expected = _run(impl, hidden, weight, bias)
    strided = hidden.transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.randn(weight.shape[0], 2 * weight.shape[1], device=device)
    wide[:, ::2] = weight
    both = torch.stack([bias, bias], dim=1)
    got = _run(
        impl, strided, wide[:, ::2], both[:, 0], grad=torch.ones(1, 1, device=device).expand(2, weight.shape[0])
    )
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", OWN)
@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_the_gradients_asked_for(impl, wanted, device):
    inputs = make_inputs([3, 4], 8, 11, device=device)
    leaves = [t.detach().requires_grad_(want) for t, want in zip(inputs.leaves(torch.float32), wanted, strict=True)]
    out = sparton.lsr_head(*leaves, cu_seqlens=inputs.cu_seqlens, impl=impl)
    out.backward(inputs.grad.float())
    for leaf, want, expected in zip(leaves, wanted, truth(inputs)[1:], strict=True):
        assert (leaf.grad is not None) == want
        if want:
            torch.testing.assert_close(leaf.grad, expected.float())


@pytest.mark.parametrize("impl", OWN)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_master_weights_under_autocast(impl, dtype, device):
    if device.type == "cpu" and dtype == torch.float16:
        pytest.skip("autocast in fp16 is for GPUs")
    inputs = make_inputs([6, 3], 16, 29, dtype=dtype, device=device)

    def run(name):
        leaves = inputs.leaves(torch.float32)
        with torch.autocast(device.type, dtype=dtype):
            out = sparton.lsr_head(*leaves, cu_seqlens=inputs.cu_seqlens, impl=name)
        return [out, *torch.autograd.grad(out, leaves, inputs.grad.to(out.dtype))]

    for got, naive, want in zip(run(impl), run("naive"), truth(inputs), strict=True):
        assert_no_worse(str(dtype), got, naive, want, EPSILON[dtype])
    out, *gradients = run(impl)
    assert out.dtype == dtype and all(g.dtype == torch.float32 for g in gradients)


@pytest.mark.parametrize("impl", OWN)
def test_hidden_and_weight_of_different_dtypes(impl, device):
    inputs = make_inputs([6, 3], 16, 29, dtype=torch.bfloat16, device=device)
    hidden, weight, bias = inputs.leaves(torch.float32)
    hidden = hidden.detach().bfloat16().requires_grad_()
    out = sparton.lsr_head(hidden, weight, bias, cu_seqlens=inputs.cu_seqlens, impl=impl, out_dtype=torch.float32)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, truth(inputs)[0].float(), rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(out, [hidden, weight, bias], inputs.grad.float())
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.parametrize("impl", OWN)
def test_gradients_are_the_same_bits(impl, device):
    inputs = make_inputs([9, 2, 5], 16, 33, shift=1.0, device=device)
    first = compute(inputs, impl, torch.float32)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, compute(inputs, impl, torch.float32), strict=True))


@pytest.mark.parametrize("impl", OWN)
@pytest.mark.parametrize("length, dtype", [(256, torch.uint8), (257, torch.int16), (32769, torch.int32)])
def test_positions_in_the_smallest_integer(impl, length, dtype, device):
    hidden = torch.zeros(8, 4, device=device)
    hidden[7] = 1  # the winner stands last
    cu = torch.tensor([0, 8], device=device)
    out, _, positions = lsr_forward(
        hidden, torch.ones(3, 4, device=device), None, cu, length, "log1p", torch.float32, torch.float32, impl
    )
    assert positions.dtype == dtype and positions.tolist() == [[7, 7, 7]]


@pytest.mark.parametrize("impl", OWN)
def test_opcheck(impl, device):
    inputs = make_inputs([3, 0, 4], 8, 11, device=device)
    leaves, cu = inputs.leaves(torch.float32), inputs.cu_seqlens
    torch.library.opcheck(lsr_forward, (*leaves, cu, 4, "log1p", torch.float32, torch.float32, impl))
    hidden, weight, bias = (t.detach() for t in leaves)
    _, factor, positions = lsr_forward(hidden, weight, bias, cu, 4, "log1p", torch.float32, torch.float32, impl)
    args = (inputs.grad.float(), factor, positions, hidden, weight, bias, cu, 4, True, True, True, impl)
    torch.library.opcheck(lsr_backward, args)


@pytest.mark.parametrize("impl", ALL)
def test_compiles_without_graph_breaks(impl, device):
    hidden, weight, bias = _padded(device)
    mask = torch.ones(2, 7, dtype=torch.long, device=device)

    def loss(h, w, b):
        return sparton.lsr_head(h, w, b, mask, impl=impl).square().sum()

    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    torch._dynamo.reset()
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_head_counts_and_stops_at_the_limit(device):
    torch._dynamo.reset()
    head = sparton.CompiledHead(6, 9).to(device)
    before = head.compile_count
    with torch._dynamo.config.patch(recompile_limit=1):
        head(torch.randn(2, 5, 6, device=device))
        assert head.compile_count > before
        with pytest.raises(Exception, match="recompile"):
            head(torch.randn(2, 5, 6, device=device), torch.ones(2, 5, dtype=torch.long, device=device))
    torch._dynamo.reset()


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("impl", OWN)
def test_no_tensor_of_the_size_of_the_logits(impl, monkeypatch, device):
    monkeypatch.setattr("sparton.tiled.TILE_ELEMENTS", {"cpu": 512, "cuda": 512})
    hidden, weight, bias = _padded(device, batch=4, seqlen=32, dim=4, vocab=96)
    rows, cu = hidden.flatten(0, 1), 32 * torch.arange(5, device=device)
    with _Largest() as watched:  # within the operators, which are all that a mode sees of the head
        out, *saved = _compute_forward(rows, weight, bias, cu, 32, "log1p", torch.float32, torch.float32, impl)
        _compute_backward(torch.ones_like(out), *saved, rows, weight, bias, cu, 32, True, True, True, impl)
    assert 4 * 96 <= watched.elements < 4 * 32 * 96 / 2
    with _Largest() as watched:
        _run("naive", hidden, weight, bias)
    assert watched.elements >= 4 * 32 * 96


@pytest.mark.parametrize("kind", HEADS)
def test_one_state_dict_and_tied_weights(kind, device):
    decoder = torch.nn.Linear(6, 9).to(device)
    head = kind.from_linear(decoder)
    assert head.weight is decoder.weight and head.bias is decoder.bias
    assert list(head.state_dict()) == ["weight", "bias"]
    hidden, mask = torch.randn(2, 5, 6, device=device), torch.ones(2, 5, dtype=torch.long, device=device)
    expected = (decoder(hidden).relu().log1p()).amax(1)
    torch.testing.assert_close(head(hidden, mask), expected)
    cu = torch.tensor([0, 5, 10], device=device)
    torch.testing.assert_close(head(hidden.reshape(10, 6), cu_seqlens=cu, max_seqlen=5), expected)
    assert kind(6, 9, bias=False).bias is None


@pytest.mark.parametrize(
    "change, match",
    [
        ({"weight": torch.zeros(3, 5)}, r"weight: expected \(V, D\) with D = 4"),
        ({"bias": torch.zeros(2)}, r"bias: expected \(3,\)"),
        ({"attention_mask": torch.ones(2, 2)}, "attention_mask: expected"),
        ({"attention_mask": torch.ones(2, 5)}, "attention_mask: expected bool or integers"),
        ({"attention_mask": torch.ones(2, 5, device="meta").bool()}, "attention_mask: expected device cpu .* got meta"),
        ({"cu_seqlens": torch.tensor([0, 2])}, r"hidden: expected packed rows \(N, D\)"),
        ({"hidden": torch.zeros(5, 4)}, "together with cu_seqlens"),
        ({"hidden": torch.zeros(5, 4), "cu_seqlens": torch.tensor([0, 9])}, "ascending offsets"),
        ({"hidden": torch.zeros(5, 4), "cu_seqlens": torch.tensor([0, 5]), "max_seqlen": 4}, "upper bound"),
        ({"hidden": torch.zeros(5, 4), "cu_seqlens": torch.tensor([0, 5]), "max_seqlen": 5.0}, "an int >= 0, got 5.0"),
        ({"hidden": torch.zeros(5, 4), "cu_seqlens": torch.tensor([0, 5]), "max_seqlen": torch.tensor(5)}, "an int"),
        ({"hidden": torch.zeros(5, 4), "cu_seqlens": torch.tensor([0]), "max_seqlen": -3}, "an int >= 0, got -3"),
        ({"hidden": torch.zeros(5, 4), "cu_seqlens": torch.tensor([0.0, 5])}, "int32 or int64"),
        ({"hidden": torch.zeros(2, 5, 4, dtype=torch.int32)}, "hidden: expected a float32"),
        ({"hidden": torch.tensor(1.0)}, r"hidden: expected \(B, S, D\)"),
        ({"hidden": torch.zeros(2, 5, 0), "weight": torch.zeros(3, 0)}, "hidden: expected at least one column"),
        ({"hidden": META.new_zeros(2, 5, 4), "weight": META.new_zeros(3, 4), "bias": None}, "hidden: expected values"),
        ({"out_dtype": torch.int32}, "out_dtype: expected float32"),
        ({"out_dtype": torch.float8_e4m3fn}, "out_dtype: expected float32"),
        ({"activation": "relu"}, "activation: expected one of"),
        ({"impl": "cuda"}, "impl: expected one of"),
    ],
)
@pytest.mark.parametrize("impl", ALL)
def test_errors_name_argument_expected_and_got(change, match, impl):
    arguments = {"hidden": torch.zeros(2, 5, 4), "weight": torch.zeros(3, 4), "bias": torch.zeros(3), "impl": impl}
    with pytest.raises((ValueError, TypeError), match=match) as caught:
        sparton.lsr_head(**arguments | change)
    assert "\n" not in str(caught.value)


def test_triton_without_a_gpu_says_why(monkeypatch):
    monkeypatch.setattr("sparton.functional.INTERPRETED", False)
    with pytest.raises(ValueError, match="CUDA device, got cpu"):
        sparton.lsr_head(torch.zeros(1, 2, 4), torch.zeros(3, 4), impl="triton")
    monkeypatch.setattr("sparton.functional.HAS_TRITON", False)
    assert "not installed" in why_not_triton(torch.device("cuda"))


def test_importing_sparton_imports_no_triton():
    code = "import sys, sparton; assert not any(m == 'sparton.kernels' or m == 'hydra' for m in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
