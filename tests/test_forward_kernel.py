"""The forward kernel over slots: chunks, tiles and programs in any combination, on small tiles; the head with it."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparton
from sparton.testing import EPSILON, assert_no_worse, compute, make_inputs, relative_error, truth
from tests.test_head_values import DTYPES, NAMES, SHAPES

triton = pytest.importorskip("triton")

from sparton.kernels import forward  # noqa: E402
from sparton.kernels.configs import GROUP, TILES, ForwardPlan, Tile, forward_plan  # noqa: E402
from sparton.kernels.slots import make_slots  # noqa: E402
from sparton.tiled import position_dtype, tiled_forward  # noqa: E402


def rows_and_offsets(lengths: list[int], dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed rows of small integers, so that every product is exact and ties are many."""
    generator = torch.Generator().manual_seed(sum(lengths) + dim)
    hidden = torch.randint(-2, 3, (sum(lengths) + 3, dim), generator=generator).float()
    hidden[sum(lengths) :] = float("nan")
    return hidden, torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def small_plan(monkeypatch, **changes) -> None:
    """Makes the launcher use tiles of 16 words and 32 rows."""

    def plan(kind: str, *shape: int) -> ForwardPlan:
        made = forward_plan(kind, *shape, tile=Tile(16, 32, 16, 4, 2))
        return made if made.equal else dataclasses.replace(made, **{k: min(v, shape[0]) for k, v in changes.items()})

    monkeypatch.setattr(forward, "forward_plan", plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("lengths", "chunk"),
    [
        ([5, 16, 1, 32, 40], 1), ([5, 16, 1, 32, 40], 2), ([33, 64, 0, 100, 7, 31], 4), ([64, 64, 64], 3),
        ([64, 64, 64], 1), ([7], 1), ([0], 1), ([0, 0, 70, 0], 4), ([32, 20, 9, 31], 4), ([16] * 9, 4),
        ([3, 0, 12, 16, 1], 2),
    ],
)  # fmt: skip
def test_any_schedule_gives_the_same(lengths, chunk, dtype, device, monkeypatch):
    small_plan(monkeypatch, chunk=chunk)
    hidden, cu_seqlens = (t.to(device) for t in rows_and_offsets(lengths, 24))
    generator = torch.Generator().manual_seed(1)
    weight = torch.randint(-2, 3, (37, 24), generator=generator).float().to(device)
    bias = torch.randint(-6, 7, (37,), generator=generator).float().to(device)
    arguments = (weight.to(dtype), bias.to(dtype), cu_seqlens, max(max(lengths), 1), "log1p", dtype, torch.float32)
    out, factor, positions = forward.triton_forward(hidden.to(dtype), *arguments)
    expected, expected_factor, expected_positions = tiled_forward(hidden.to(dtype), *arguments)
    # 16-bit operands: the logit's low bits hold the place.
    torch.testing.assert_close(out, expected, atol=5e-5, rtol=0)
    torch.testing.assert_close(factor.float(), expected_factor.float(), atol=6e-4, rtol=0)
    active = expected > 0
    assert active.any() or max(lengths) == 0
    assert torch.equal(positions[active].long(), expected_positions[active].long())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "lengths", [[64, 64], [64, 6], [10, 14, 0, 3], [128, 127, 120], [250, 200], [25, 32, 3], [60] * 5]
)
def test_equal_slots_are_the_device_s_choice(lengths, dtype, device):
    # As a padded batch would come: the host knows an upper bound of the real rows.
    bound = len(lengths) * max(lengths)
    hidden, cu_seqlens = (t.to(device) for t in rows_and_offsets(lengths, 16))
    hidden = torch.cat([hidden, torch.full((bound, 16), torch.nan, device=device)])[:bound]
    weight = torch.randint(-2, 3, (37, 16), generator=torch.Generator().manual_seed(1)).float().to(device)
    arguments = (weight.to(dtype), None, cu_seqlens, max(lengths), "log1p_log1p", dtype, torch.float32)
    out, _, positions = forward.triton_forward(hidden.to(dtype), *arguments)
    expected, _, expected_positions = tiled_forward(hidden.to(dtype), *arguments)
    torch.testing.assert_close(out, expected, atol=5e-5, rtol=0)
    assert torch.equal(positions[expected > 0].long(), expected_positions[expected > 0].long())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dim", [1, 4, 8, 16, 100, 8192])  # 1, and 4 and 100 in 16 bits: not what bulk copies can load
def test_any_hidden_size(dim, dtype, device):
    hidden, cu_seqlens = (t.to(device) for t in rows_and_offsets([20, 3, 40], dim))
    weight = torch.randint(-2, 3, (37, dim), generator=torch.Generator().manual_seed(1)).float().to(device)
    arguments = (hidden.to(dtype), weight.to(dtype), None, cu_seqlens, 40, "log1p", dtype, torch.float32)
    out, _, positions = forward.triton_forward(*arguments)
    expected, _, expected_positions = tiled_forward(*arguments)
    torch.testing.assert_close(out, expected, atol=5e-5, rtol=0)
    assert torch.equal(positions[expected > 0].long(), expected_positions[expected > 0].long())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_interpreter_multiplies_bfloat16_of_a_gpu():
    code = """
import sparton, torch
hidden, weight = torch.randn(2, 40, 16).cuda().bfloat16(), torch.randn(21, 16).cuda().bfloat16()
got, want = (sparton.lsr_head(hidden, weight, impl=impl) for impl in ("triton", "tiled"))
torch.testing.assert_close(got, want)
"""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("the interpreter of Triton 3.6 runs no loop with NumPy 2.4")
    assert done.returncode == 0, done.stderr[-2000:]


def test_amd_s_capabilities_promise_nothing(monkeypatch):
    """PyTorch calls these cards "cuda", and an MI200 has the capability (9, 0)."""
    weight = mock.Mock(shape=(32, 64), is_cuda=True, device=torch.device("cuda"))
    weight.element_size.return_value, weight.data_ptr.return_value = 2, 4096
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    hopper = pytest.importorskip("sparton.kernels.forward_hopper")
    for version, nvidia in ((None, True), ("6.4", False)):
        monkeypatch.setattr(torch.version, "hip", version)
        bulk = forward._bulk_copies_reach(weight)
        assert (bulk, hopper.hopper_forward_supports(weight, torch.bfloat16)) == (nvidia, nvidia)
        kind = forward._kind(torch.bfloat16, "ieee", weight.device)
        assert kind == ("16 bits, 227 KB" if nvidia else "16 bits")
        assert forward._precision(torch.float32, weight.device) == ("tf32x3" if nvidia else "ieee")


@pytest.fixture(params=["fp32_precision", "set_float32_matmul_precision"])
def tf32(request):
    """TF32 asked for by either of PyTorch's names for it; as it was afterwards."""
    before = torch.backends.cuda.matmul.fp32_precision
    if request.param == "fp32_precision":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    else:
        torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = before


def test_tf32_is_asked_for_as_in_pytorch(tf32):
    assert forward._precision(torch.float32, torch.device("cpu")) == "tf32"
    assert forward._precision(torch.bfloat16, torch.device("cpu")) == "ieee"


def test_float32_is_exact_by_default(device):
    assert forward._precision(torch.float32, device) == ("tf32x3" if device.type == "cuda" else "ieee")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tf32_errs_as_pytorch_does(tf32):
    inputs = make_inputs([40, 3, 100], 768, 1000, shift=0, device="cuda")
    want = truth(inputs)[0]
    error, naive = (relative_error(compute(inputs, impl, torch.float32)[0], want) for impl in ("triton", "naive"))
    # 10 bits of the operands instead of 23, here cut off and not rounded: it shows, and not much more than there.
    assert 1e-5 < error < 4 * naive


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 600), min_size=1, max_size=40),
    kind=st.sampled_from(sorted(TILES)),
    vocab=st.sampled_from([1, 1000, 250_002]),
    programs=st.sampled_from([1, 8, 132]),
)
def test_a_plan_covers_every_row(lengths, kind, vocab, programs):
    longest = max(*lengths, 1)
    plan = forward_plan(kind, len(lengths), sum(lengths), longest, vocab, 768, programs)
    group = plan.equal if plan.equal and sum(lengths) >= plan.equal_from else GROUP
    slots = [max(-(-length // group), 1) * group for length in lengths]
    assert sum(slots) <= plan.rows
    assert plan.tile.block_s % group == 0 and plan.chunk >= 1
    if plan.equal:
        assert max(slots) <= plan.equal and plan.chunk % (plan.tile.block_s // plan.equal) == 0
        assert group == GROUP or set(slots) == {plan.equal}


def test_a_model_compiles_few_forward_kernels():
    """What is fixed at compile time, over batches and lengths of all sizes: a tile for one query, one for more."""
    for kind in TILES:
        plans = {
            forward_plan(kind, batch, batch * mean, longest, 30_522, 768, 132): position_dtype(longest)
            for batch in [1, 2, 3, 4, 7, 32, 33, 512, 4096]
            for longest in [1, 8, 16, 17, 31, 32, 33, 64, 100, 128, 129, 256, 300, 512, 4096, 8192]
            for mean in {1, longest // 2, longest}
        }
        assert {plan.tile for plan in plans} == set(TILES[kind])
        assert len({(plan.tile, dtype) for plan, dtype in plans.items()}) <= 6
        assert all(0 <= plan.equal <= plan.tile.block_s for plan in plans)


def test_slots_repeat_the_last_row(device):
    lengths = [5, 0, 16, 17]
    hidden, cu_seqlens = (t.to(device) for t in rows_and_offsets(lengths, 40))
    plan = forward_plan("ieee", 4, 41, 17, 8, 40, 1)
    # 38 rows; equal slots of 32 rows, asked for from one more on, are not made.
    rows, starts = make_slots(hidden, cu_seqlens, torch.float32, dataclasses.replace(plan, equal=32, equal_from=39))
    assert starts.tolist() == [0, 16, 32, 48, 80, 0]
    equal_rows, equal_starts = make_slots(hidden, cu_seqlens, torch.float32, dataclasses.replace(plan, equal_from=38))
    assert plan.equal == 32 and equal_starts.tolist() == [0, 32, 64, 96, 128, 32]
    torch.testing.assert_close(equal_rows[96:], rows[48:80])
    for first, begin, length in zip(starts.tolist(), cu_seqlens.tolist(), lengths, strict=False):
        slot = 32 if length == 17 else 16
        source = begin + torch.arange(slot).clamp_max(length - 1)
        expected = hidden[source.to(device)] if length else torch.zeros(slot, 40, device=device)
        torch.testing.assert_close(rows[first : first + slot], expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_the_head_is_no_worse_than_naive(shape, bias, dtype, device):
    inputs = make_inputs(*SHAPES[shape], bias=bias, dtype=dtype, device=device)
    results = zip(NAMES, compute(inputs, "triton", dtype), compute(inputs, "naive", dtype), truth(inputs), strict=True)
    for name, got, naive, want in results:
        if want is not None:
            assert_no_worse(name, got, naive, want, EPSILON[dtype])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter computes with numpy
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("overflow", [float("nan"), float("inf")])
def test_an_overflow_of_a_real_row_reaches_the_output(dtype, overflow, device):
    hidden = torch.ones(2, 20, 4, dtype=dtype, device=device)
    hidden[1, 7, 2] = overflow  # whoever scales a fp16 loss must see it
    out = sparton.lsr_head(hidden, torch.ones(3, 4, dtype=dtype, device=device), None, impl="triton")
    assert torch.isfinite(out[0]).all() and not torch.isfinite(out[1]).any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("hopper", ["1", "0"])  # the Gluon kernel where the card has it, and the plain one
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [72, 768])
@pytest.mark.parametrize(
    "lengths",
    [[512] * 3, [300, 0, 1, 77, 513], [30] * 40, [128] * 5, [9, 31] * 90, [700], [20], [64] * 9, [16] * 50, [256] * 3],
)
def test_tiles_of_full_size(lengths, dim, dtype, hopper, monkeypatch):
    monkeypatch.setenv("SPARTON_HOPPER", hopper)
    hidden, cu_seqlens = (t.cuda() for t in rows_and_offsets(lengths, dim))
    generator = torch.Generator().manual_seed(1)
    weight = torch.randint(-2, 3, (1000, dim), generator=generator).cuda().to(dtype)
    bias = torch.randint(-60, 7, (1000,), generator=generator).cuda().to(dtype)
    arguments = (hidden.to(dtype), weight, bias, cu_seqlens, max(lengths), "log1p", dtype, torch.float32)
    out, factor, positions = forward.triton_forward(*arguments)
    expected, expected_factor, expected_positions = tiled_forward(*arguments)
    torch.testing.assert_close(out, expected, atol=5e-5, rtol=0)
    torch.testing.assert_close(factor.float(), expected_factor.float(), atol=6e-4, rtol=0)
    assert torch.equal(positions[expected > 0].long(), expected_positions[expected > 0].long())
