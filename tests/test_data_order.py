"""The order of examples and the loader that can be taken up after any batch."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import torch

from datamodules.beir_module import BeirDataModule, share_out
from datamodules.order import BatchPlan, EpochOrder
from tests.data_helpers import loader_arguments, write_collection


def test_an_epoch_takes_every_example_once_and_sources_evenly():
    order = EpochOrder([30, 100], [30, 30], seed=1)
    sources, indices = order.epoch(0)
    assert sorted(indices[sources == 0].tolist()) == list(range(30))
    assert all(abs(sources[a : a + 8].sum() - 4) <= 1 for a in range(52))


def test_a_source_is_walked_permutation_by_permutation():
    order = EpochOrder([7], [3], seed=1)
    drawn = np.concatenate([order.epoch(epoch)[1] for epoch in range(7)])
    assert all(sorted(drawn[a : a + 7].tolist()) == list(range(7)) for a in (0, 7, 14))


def test_order_depends_on_seed_and_epoch_alone():
    first = EpochOrder([50], [50], seed=1)
    again = pickle.loads(pickle.dumps(first))
    assert again.epoch(4)[1].tolist() == first.epoch(4)[1].tolist()
    assert first.epoch(4)[1].tolist() != first.epoch(5)[1].tolist()
    assert first.epoch(4)[1].tolist() != EpochOrder([50], [50], seed=2).epoch(4)[1].tolist()
    with pytest.raises(ValueError, match="seed: expected a number >= 0"):
        EpochOrder([50], [50], seed=-1)


@pytest.mark.parametrize("budget", [1, 60, 400, 10**6])
def test_token_budget(budget):
    lengths = [np.random.default_rng(0).integers(5, 60, 80)]
    plan = BatchPlan(EpochOrder([80], [80], seed=0), None, budget, lengths)
    for epoch in range(3):
        batches = list(plan.batches(epoch))
        assert len(batches) == plan.batches_per_epoch
        assert sorted(index for batch in batches for _, index in batch) == list(range(80))
        sizes = [lengths[0][[index for _, index in batch]].sum() for batch in batches]
        assert min(map(len, batches)) >= 1
        assert max(sizes) <= budget + 60 or max(map(len, batches)) == 1


def test_batch_size_errors():
    order = EpochOrder([5], [5], seed=0)
    with pytest.raises(ValueError, match="batch.size: expected a number >= 1, got 0"):
        BatchPlan(order, 0)
    with pytest.raises(ValueError, match="batch.size: expected a number where"):
        BatchPlan(order, None)


def test_share_out():
    assert share_out(10, [1, 1, 1]) == [4, 3, 3]
    assert share_out(7, [0, 2]) == [0, 7]


@pytest.fixture
def folder(tmp_path):
    return write_collection(tmp_path / "small")


def module(folder, **changes):
    return BeirDataModule(folder, title_pairs=0.5, **loader_arguments(**changes))


def ids(batch) -> list:
    return [batch.query.input_ids.tolist(), batch.doc.input_ids.tolist()]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("tokens", [None, 150])
def test_resumes_after_any_batch(folder, num_workers, tokens):
    reference = module(folder, batch_tokens=tokens).train_dataloader()
    epochs = [[ids(batch) for batch in reference] for _ in range(3)]
    assert [len(epoch) for epoch in epochs] == [len(reference)] * 3
    for taken in (0, 1, len(reference) - 1) if num_workers else range(len(reference)):
        loader = module(folder, batch_tokens=tokens, num_workers=num_workers).train_dataloader()
        assert len(list(loader)) == len(reference)
        iterator = iter(loader)
        for _ in range(taken):
            next(iterator)
            loader.confirm()
        state = loader.state_dict()
        if taken:
            next(iterator)  # handed out, but training is not done with it: it must come again
        assert loader.state_dict() == state
        loader.close()
        resumed = module(folder, batch_tokens=tokens, num_workers=num_workers).train_dataloader()
        resumed.load_state_dict(state)
        assert [ids(batch) for batch in resumed] == epochs[1][taken:]
        assert [ids(batch) for batch in resumed] == epochs[2]
        resumed.close()


def test_random_state_and_environment_stay_untouched(folder):
    before = torch.get_rng_state(), os.environ.get("TOKENIZERS_PARALLELISM")
    loader = module(folder, num_workers=1).train_dataloader()
    next(iter(loader))
    loader.close()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert os.environ.get("TOKENIZERS_PARALLELISM") == before[1]


def test_a_state_of_another_order_is_refused(folder):
    loader = module(folder, batch_size=2).train_dataloader()
    state = {**loader.state_dict(), "batches": 3}
    with pytest.raises(ValueError, match="ckpt_path: expected a checkpoint of epochs of"):
        module(folder).train_dataloader().load_state_dict(state)


def test_processes_share_the_batches(folder):
    whole = module(folder).train_dataloader()
    plan, assembler = whole.plan, whole.assembler
    all_ids = [ids(batch) for batch in whole]
    parts = [type(whole)(plan, assembler, rank=rank, world_size=2) for rank in range(2)]
    merged = [ids(batch) for pair in zip(*parts, strict=True) for batch in pair]
    assert merged == all_ids[: len(merged)] and len(all_ids) - len(merged) < 2
