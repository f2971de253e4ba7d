"""Regularisers against numbers computed by hand, gradcheck, sentence-transformers and a run of two processes."""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import nn

from sparton.losses import DFFLOPS, FLOPS, L1, AntiZero, Regularizer

CONF = Path(__file__).resolve().parent.parent / "conf"

# Three texts over four words; active dimensions 2, 1, 0.
REP = [[3.0, 0.0, 1.0, 0.0], [3.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]


def rep(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor(REP, dtype=dtype)


def test_flops_by_hand():
    # Means 2, 0, 1/3, 0: 4 + 1/9.
    assert FLOPS(weight=1.0)(rep()).item() == pytest.approx(4 + 1 / 9, abs=1e-12)


def test_l1_by_hand():
    # Norms 4, 3, 0.
    assert L1(weight=1.0)(rep()).item() == pytest.approx(7 / 3, abs=1e-12)


def test_anti_zero_by_hand():
    # Everything sums to 7.
    assert AntiZero(weight=1.0)(rep()).item() == pytest.approx(1 / (49 + 1e-6), abs=1e-12)
    assert AntiZero(weight=1.0)(torch.zeros(2, 3)).item() == pytest.approx(1e6)


def test_df_flops_by_hand():
    # Shares of texts: 2/3, 0, 1/3, 0. With alpha = 1/4 the exponent log_alpha(2) is -1/2, with beta = 2:
    #   w(2/3) = 1 / (1 + (sqrt(1.5) - 1)^2),  w(1/3) = 1 / (1 + (sqrt(3) - 1)^2),  w(0) = 0.
    first, third = 1 / (1 + (math.sqrt(1.5) - 1) ** 2), 1 / (1 + (math.sqrt(3) - 1) ** 2)
    regularizer = DFFLOPS(weight=1.0, alpha=0.25, beta=2.0)
    assert regularizer(rep(torch.float32)).item() == pytest.approx((first * 2) ** 2 + (third / 3) ** 2, rel=1e-6)
    assert regularizer.term_weights().tolist() == pytest.approx([first, 0.0, third, 0.0], rel=1e-6)


def test_df_flops_weight_at_its_landmarks():
    regularizer = DFFLOPS(weight=1.0, alpha=0.1, beta=10.0)
    regularizer.document_frequency = torch.tensor([0.0, 1e-6, 0.1, 1.0])
    assert regularizer.term_weights().tolist() == pytest.approx([0.0, 0.0, 0.5, 1.0], abs=1e-6)


def test_df_flops_keeps_a_running_mean_and_only_in_training():
    regularizer = DFFLOPS(weight=1.0, momentum=0.6)
    batches = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 1.0]])]
    for batch, expected in zip(batches, ([1.0, 0.0], [0.5, 0.5], [0.7, 0.7]), strict=True):
        # Kept shares: 0, 1/2, then 0.6 (2/3 is above the momentum).
        regularizer(batch)
        assert regularizer.document_frequency.tolist() == pytest.approx(expected)
    regularizer.eval()
    regularizer(batches[0])
    assert regularizer.document_frequency.tolist() == pytest.approx([0.7, 0.7])


def test_df_flops_survives_a_checkpoint(tmp_path):
    trained = DFFLOPS(weight=1.0)
    trained(rep(torch.float32))
    torch.save(nn.ModuleDict({"df": trained}).state_dict(), tmp_path / "state.pt")
    fresh = DFFLOPS(weight=1.0)
    nn.ModuleDict({"df": fresh}).load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    other = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    assert fresh(other).item() == trained(other).item()
    assert torch.equal(fresh.document_frequency, trained.document_frequency)


def test_threshold_exempts_sparse_texts_but_counts_them():
    # Only the first text has more than one active dimension: means 1, 0, 1/3, 0.
    assert FLOPS(weight=1.0, threshold=1)(rep()).item() == pytest.approx(1 + 1 / 9, abs=1e-12)
    assert L1(weight=1.0, threshold=1)(rep()).item() == pytest.approx(4 / 3, abs=1e-12)
    assert FLOPS(weight=1.0, threshold=2)(rep()).item() == 0.0
    regularizer = DFFLOPS(weight=1.0, threshold=2)
    assert regularizer(rep()).item() == 0.0
    assert regularizer.document_frequency.tolist() == pytest.approx([2 / 3, 0, 1 / 3, 0])


def frozen_df() -> DFFLOPS:
    regularizer = DFFLOPS(weight=1.0, alpha=0.3, beta=2.0).double()
    regularizer(torch.rand(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))
    return regularizer.eval()


@pytest.mark.parametrize(
    "regularizer",
    [FLOPS(weight=1.0), FLOPS(weight=1.0, threshold=3), L1(weight=1.0), AntiZero(weight=1.0), frozen_df()],
    ids=lambda regularizer: type(regularizer).__name__,
)
def test_gradcheck(regularizer):
    values = torch.rand(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1
    values[0, :4] = 0.0
    # Away from the kink of |x|: the zeros stay where they are, through the mask.
    mask = values != 0
    values.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: regularizer(torch.where(mask, x, 0.0)), (values,))


@pytest.mark.parametrize("make", [FLOPS, L1, DFFLOPS, AntiZero])
def test_sums_are_float32_for_bfloat16_and_under_autocast(make):
    # 4,096 ones in bfloat16 would stop counting at 256.
    ones = torch.ones(4096, 3, dtype=torch.bfloat16)
    regularizer = make(weight=1.0)
    value = regularizer(ones)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(make(weight=1.0)(ones.double()).item(), rel=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert regularizer(ones.float()).item() == value.item()


def test_weight_follows_the_global_step():
    regularizer = FLOPS(weight=0.5, warmup=0.5, shape="linear")
    assert [regularizer.weight_at(step, 40) for step in (0, 10, 20, 30)] == pytest.approx([0, 0.25, 0.5, 0.5])
    # A pure function: asking again, or out of order, changes nothing.
    assert regularizer.weight_at(10, 40) == 0.25


@pytest.mark.parametrize(
    "make",
    [
        lambda: FLOPS(weight=-1.0),
        lambda: FLOPS(weight=1.0, threshold=-1),
        lambda: FLOPS(weight=1.0, threshold=1.5),
        lambda: L1(weight=1.0, shape="cubic"),
        lambda: L1(weight=1.0, warmup=2.0),
        lambda: DFFLOPS(weight=1.0, alpha=1.0),
        lambda: DFFLOPS(weight=1.0, beta=0.0),
        lambda: DFFLOPS(weight=1.0, momentum=1.0),
        lambda: FLOPS(weight=1.0)(torch.zeros(3)),
        lambda: FLOPS(weight=1.0)(torch.zeros(0, 3)),
        lambda: L1(weight=1.0)(torch.zeros(2, 3, dtype=torch.int64)),
        lambda: DFFLOPS(weight=1.0).eval()(torch.zeros(2, 3)),
        lambda: Regularizer(weight=1.0)(torch.zeros(2, 3)),
    ],
)
def test_bad_arguments_raise_one_line(make):
    with pytest.raises((ValueError, TypeError)) as error:
        make()
    assert "\n" not in str(error.value)
    assert "got" in str(error.value)


def test_df_flops_refuses_another_vocabulary():
    regularizer = DFFLOPS(weight=1.0)
    regularizer(torch.ones(2, 3))
    with pytest.raises(ValueError, match="V=4"):
        regularizer(torch.ones(2, 4))


@pytest.mark.parametrize("threshold", [None, 1, 5])
def test_flops_equals_sentence_transformers(threshold):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("sentence_transformers.sparse_encoder")
        from sentence_transformers.sparse_encoder.losses import FlopsLoss
    values = torch.rand(6, 9, generator=torch.Generator().manual_seed(0))
    values = values * (values > 0.4)
    expected = FlopsLoss(nn.Identity(), threshold=threshold).compute_loss_from_embeddings(values)
    assert FLOPS(weight=1.0, threshold=threshold)(values).item() == pytest.approx(expected.item(), rel=1e-6)


def _one_rank(rank: int, store: str, results: str) -> None:
    """Computes each penalty on this rank's part of a batch, and its gradient averaged over ranks as DDP does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    whole = torch.rand(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = {}
    for make in (FLOPS, DFFLOPS, AntiZero):
        scale = torch.ones(4, dtype=torch.float64, requires_grad=True)
        value = make(weight=1.0)((whole[:2], whole[2:])[rank] * scale)
        value.backward()
        dist.all_reduce(scale.grad)
        found[make.__name__] = (value.item(), (scale.grad / 2).tolist())
    if rank == 0:
        torch.save(found, results)
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may still drop tensors: asking a dying interpreter for its lock aborts the process


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_penalties_are_over_the_global_batch(tmp_path):
    mp.spawn(_one_rank, (str(tmp_path / "store"), str(tmp_path / "found.pt")), nprocs=2)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    whole = torch.rand(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for make in (FLOPS, DFFLOPS, AntiZero):
        scale = torch.ones(4, dtype=torch.float64, requires_grad=True)
        value = make(weight=1.0)(whole * scale)
        value.backward()
        assert found[make.__name__][0] == pytest.approx(value.item(), rel=1e-6), make.__name__
        assert found[make.__name__][1] == pytest.approx(scale.grad.tolist(), rel=1e-6), make.__name__


@pytest.mark.parametrize("query", ["flops", "l1", "df_flops", "anti_zero", "flops_anti_zero", "none"])
def test_every_regularizer_config_composes_on_either_side(query):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", [f"regularizer@regularizer.query={query}", "flops_weight=0.5"])
    assert config.regularizer.doc.flops.weight == 0.5
    built = instantiate(config.regularizer)
    assert set(built.doc) == {"flops"}
    expected = {"flops_anti_zero": {"flops", "anti_zero"}, "none": set()}.get(query, {query})
    modules = nn.ModuleDict(built.query or {})
    assert set(modules) == expected
    for regularizer in modules.values():
        assert torch.isfinite(regularizer(rep(torch.float32)))
