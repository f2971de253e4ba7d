"""The batch finder: the search, tries that leave no trace, errors of memory, limits, several processes."""

from __future__ import annotations

import csv
import json
import os
import socket
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from data_helpers import write_collection
from hydra.errors import InstantiationException
from test_train import SMALL, configuration, losses

import train
from datamodules.order import BatchPlan, EpochOrder
from lightning_modules.callbacks import BatchFinder
from lightning_modules.callbacks.batch_finder import TOLERANCE, largest_that_fits
from lightning_modules.encoder import SparseEncoder
from lightning_modules.errors import is_out_of_memory
from lightning_modules.launch import _clean_up
from retrieval.bm25 import bm25_search

RUN = [
    *SMALL, "data=beir", "data.title_pairs=0.5", "logger=csv", "test.enabled=false", "trainer.max_steps=4",
    "trainer.val_check_interval=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """38 train queries with two documents each: with the title pairs more than 100 examples in an epoch."""
    return write_collection(tmp_path_factory.mktemp("data") / "small", docs=60, queries=40)


def spend_memory_above(rows: int, patch: pytest.MonkeyPatch, error: str = "CUDA out of memory.") -> list[int]:
    """Lets the CPU take the finder, and makes the encoder run out of memory above so many queries; logs the calls."""
    calls, forward = [], SparseEncoder.forward

    def limited(self, *batches):
        if torch.is_grad_enabled():
            calls.append(batches[0].input_ids.shape[0])
            if calls[-1] > rows:
                raise torch.OutOfMemoryError(error)
        return forward(self, *batches)

    patch.setattr(SparseEncoder, "forward", limited)
    patch.setattr(BatchFinder, "DEVICES", ("cpu", "cuda"))
    return calls


@pytest.mark.parametrize("start", [1, 7, 64, 1000, 5000])
@pytest.mark.parametrize("truth", [0, 1, 2, 3, 63, 64, 100, 999, 1000, 4000])
def test_the_search_brackets_the_truth(start, truth):
    tried = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= truth

    found, failed = largest_that_fits(start, 1000, fits)
    assert len(set(tried)) == len(tried) <= 18 and max(tried) <= 1000
    if truth >= 1000:
        assert (found, failed) == (1000, None)
    else:
        assert found <= truth < failed and failed - found <= max(1, TOLERANCE * found)


@pytest.mark.parametrize(
    ("error", "spent"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("out of resource: shared memory, Required: 300000"), False),
        (MemoryError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, spent):
    assert is_out_of_memory(error) == spent


def test_the_costliest_batch():
    lengths = [np.array([5, 1, 5, 1, 9, 1, 5, 5, 1, 1])]
    order = EpochOrder([10], [10], seed=2)
    plan = BatchPlan(order, 3, None, lengths)
    tokens = [[int(lengths[0][index]) for _, index in members] for members in plan.batches(0)]
    by_tokens, by_longest = plan.costliest(padded=False), plan.costliest(padded=True)
    batches = list(plan.batches(0))
    assert by_tokens == (k := int(np.argmax([sum(batch) for batch in tokens])), batches[k])
    assert by_longest == (k := int(np.argmax([max(batch) for batch in tokens])), batches[k])
    assert by_tokens != by_longest


def test_a_run_with_the_finder_is_the_run_with_the_batch_it_found(folder, tmp_path, monkeypatch, capsys):
    """Bit for bit: losses, weights, optimizer, scheduler, random states; with dropout, buffers, epochs that count."""
    arguments = [
        *RUN, f"data.path={folder}", "model.dropout=0.1", "regularizer@regularizer.doc=df_flops",
        "trainer.max_epochs=1", "trainer.max_steps=-1", "trainer.val_check_interval=1.0",
        "trainer.accumulate_grad_batches=2", "trainer.check_val_every_n_epoch=1",
        "scheduler.warmup=0",  # else the learning rate of the tries is 0
    ]  # fmt: skip
    bm25_search(["a word"], ["a word"], k=1)  # its first call imports jax where that is, which draws numbers of numpy
    with monkeypatch.context() as patch:
        calls = spend_memory_above(11, patch)
        train.train(configuration(tmp_path / "found", *arguments, "find_batch=true"))
    summary = json.loads((tmp_path / "found/summary.json").read_text())
    assert (summary["find_batch/size"], summary["find_batch/failed"]) == (11, 12)
    with (tmp_path / "found/find_batch.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    sizes = [4, 8, 16, 12, 10, 11]
    assert [(int(row["size"]), row["fits"]) for row in rows] == [(size, str(size <= 11)) for size in sizes]
    assert [row["error"] for row in rows] == ["", "", "CUDA out of memory.", "CUDA out of memory.", "", ""]
    tried = [4, 4, 8, 8, 16, 12, 10, 10, 11, 11]  # two steps each, one where the first fails
    assert calls[: len(tried)] == tried and set(calls[len(tried) :]) == {11}
    assert summary["find_batch/tries"] == len(rows)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("find_batch: ")]
    assert len(lines) == 2 and "11 (pairs); 12 does not fit; 6 tries" in lines[1]

    train.train(configuration(tmp_path / "given", *arguments, "batch.size=11"))
    assert losses(tmp_path / "found") == losses(tmp_path / "given") != {}
    first, second = (torch.load(tmp_path / run / "checkpoints/last.ckpt", weights_only=True)
                     for run in ("found", "given"))  # fmt: skip
    for state in (first, second):
        assert state["resume_state"]["random"][0]["numpy"].pop("name") == "MT19937"  # assert_close takes no text
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "resume_state", "global_step"):
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=0)


def test_a_budget_of_tokens_up_to_the_whole_epoch(folder, tmp_path, monkeypatch, capsys):
    spend_memory_above(1000, monkeypatch)
    budget = ["batch.tokens=1000", "batch.size=null", "find_batch=true", f"data.path={folder}", "callbacks=none"]
    budget += ["data.title_pairs=0", "trainer.max_steps=1", "trainer.val_check_interval=1"]
    train.train(configuration(tmp_path, *RUN, *budget))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert "find_batch/failed" not in summary and "find_batch/size" not in summary
    assert summary["find_batch/tokens"] > 1000
    printed = capsys.readouterr().out
    assert "all that an epoch has" in printed and " 1 batches an epoch" in printed


@pytest.mark.parametrize(("head", "padded"), [("naive", True), ("tiled", False)])
def test_a_head_that_pads_is_tried_with_the_longest_pair(folder, tmp_path, monkeypatch, head, padded):
    """Also where the backbone is packed, which costs what the tokens do."""
    spend_memory_above(4, monkeypatch)
    asked, costliest = [], BatchPlan.costliest

    def noted(plan, *, padded):
        asked.append(padded)
        return costliest(plan, padded=padded)

    monkeypatch.setattr(BatchPlan, "costliest", noted)
    packed = ["model.packed=true", "model.attention_dropout=0", f"head={head}", "callbacks=none"]
    short = ["trainer.max_steps=1", "trainer.val_check_interval=1", "find_batch=true"]
    module, data, trainer = train.build(configuration(tmp_path, *RUN, f"data.path={folder}", *packed, *short))
    trainer.fit(module, data)
    assert set(asked) == {padded}


def test_other_errors_are_raised_and_nothing_fits_is_one_line(folder, tmp_path, monkeypatch):
    cfg = configuration(tmp_path, *RUN, f"data.path={folder}", "find_batch=true", "batch.size=3")
    # Without any GPU while the run is put together, on the CPU beside one when training starts.
    with pytest.raises((InstantiationException, ValueError), match="expected a CUDA device, whose allocator .* got cpu"):
        (train.train if torch.cuda.is_available() else train.build)(cfg)
    with monkeypatch.context() as patch:
        spend_memory_above(0, patch, "CUDA out of memory.\nTried a lot")
        with pytest.raises(ValueError, match=r"for a batch of one pair, got CUDA out of memory. Tried a lot; .*"):
            train.train(cfg)
    with monkeypatch.context() as patch:
        patch.setattr(BatchFinder, "DEVICES", ("cpu", "cuda"))
        patch.setattr(SparseEncoder, "forward", lambda *batches: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.train(cfg)


def test_find_batch_without_its_callback_is_one_line(folder, tmp_path):
    cfg = configuration(tmp_path, *RUN, f"data.path={folder}", "find_batch=true", "~callbacks.batch_finder")
    with pytest.raises(ValueError, match="find_batch: expected callbacks.batch_finder with find_batch=true, got none;"):
        train.build(cfg)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"enabled": 24}, "find_batch: expected true or false, got 24"),
        ({"limit_gib": 0}, "batch.limit_gib: expected GiB > 0, or null for the whole device, got 0"),
        ({"limit_gib": "24GiB"}, "batch.limit_gib: expected GiB > 0, .* got '24GiB'"),
        ({"limit_gib": True}, "batch.limit_gib"),
        ({"margin": 1}, r"callbacks.batch_finder.margin: expected a share of the limit in \[0, 1\), got 1"),
        ({"margin": "5%"}, "callbacks.batch_finder.margin"),
        ({"enabled": True, "ckpt_path": "last.ckpt"}, "expected a run from its start, got ckpt_path=last.ckpt"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        BatchFinder(tmp_path, **arguments)
    assert "\n" not in str(error.value)


def _one_rank(rank: int, port: int, folder: str, output: str) -> None:
    """Trains on one of two processes, of which the first has memory for 9 queries and the second for 6."""
    torch.set_num_threads(1)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2, "NODE_RANK": 0, "LOCAL_RANK": rank}
    os.environ |= {name: str(value) for name, value in where.items()}
    with pytest.MonkeyPatch.context() as patch:
        calls = spend_memory_above((9, 6)[rank], patch)
        several = ["trainer.strategy=ddp", "trainer.devices=2", "find_batch=true", "trainer.max_steps=2"]
        regularizers = ["regularizer@regularizer.doc=df_flops", "callbacks=none"]
        cfg = configuration(Path(output), *RUN, f"data.path={folder}", *several, *regularizers)
        module, datamodule, trainer = train.build(cfg)
        datamodule.setup("fit")
        trainer.fit(module, datamodule)
    weights = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
    summary = trainer.callbacks[0].summary()
    torch.save({"calls": calls, "summary": summary, "weights": weights}, f"{output}/rank{rank}.pt")
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may still drop tensors: asking a dying interpreter for its lock aborts the process


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_two_processes_agree_on_the_smaller_one(folder, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_one_rank, (port, str(folder), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["summary"]["find_batch/size"] == second["summary"]["find_batch/size"] == 6
    assert first["calls"] == [4, 4, 8, 8, 6, 6, 7, 7, 6, 6]  # the last two are training
    assert second["calls"] == [4, 4, 8, 6, 6, 7, 6, 6]
    assert torch.equal(first["weights"], second["weights"])
    with (tmp_path / "find_batch.csv").open(newline="") as file:
        failures = {int(row["size"]): row["error"] for row in csv.DictReader(file) if row["fits"] == "False"}
    assert failures == {8: "another process is out of memory", 7: "another process is out of memory"}


def test_the_allocator_gets_a_share_of_the_limit_and_then_all(monkeypatch, tmp_path):
    shares, device = [], torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * 2**30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: shares.append(share))
    finder = BatchFinder(tmp_path, limit_gib=40, margin=0.1)
    finder._allow(device, 40.0, 0.9)
    finder._allow(device, finder.limit_gib)
    finder.teardown(None, None, "fit")
    assert shares == pytest.approx([0.45, 1.0, 0.5, 1.0])
    whole = BatchFinder(tmp_path, margin=0.1)
    whole._allow(device, 76.0, 0.9)
    whole._allow(device, whole.limit_gib)
    assert shares[4:] == pytest.approx([0.855, 1.0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("head", ["naive", "sparton"])
def test_a_limit_on_a_gpu(head, tmp_path):
    """The found batch fits in a fresh run under the limit, which a sixth more than what failed doesn't."""
    run = [
        "model=tiny", f"head={head}", "data=synthetic", "data.size=20000", "logger=csv", "test.enabled=false",
        "calibrate.documents=0", "trainer=gpu", "trainer.max_steps=6", "trainer.val_check_interval=6",
        "data.val_pool=64", "batch.size=16", "data.num_workers=0",
        "data.query_lengths=[12]", "data.doc_lengths=[100]",  # all batches alike
    ]  # fmt: skip
    limit = 3.0
    _clean_up(exit_code=0)
    train.train(configuration(tmp_path / "found", *run, "find_batch=true", f"batch.limit_gib={limit}"))
    summary = json.loads((tmp_path / "found/summary.json").read_text())
    assert summary["find_batch/limit_gib"] == limit
    assert 16 < summary["find_batch/size"] < summary["find_batch/failed"]
    assert summary["find_batch/peak_allocated_mib"] <= summary["find_batch/peak_reserved_mib"] <= 0.95 * limit * 1024
    assert summary["perf/peak_mem_reserved_mib"] <= limit * 1024
    total = torch.cuda.get_device_properties(0).total_memory
    _clean_up(exit_code=0)
    torch.cuda.set_per_process_memory_fraction(limit * 2**30 / total)
    try:
        train.train(configuration(tmp_path / "fits", *run, f"batch.size={summary['find_batch/size']}"))
        _clean_up(exit_code=0)
        with pytest.raises(torch.OutOfMemoryError):
            train.train(configuration(tmp_path / "fails", *run, f"batch.size={7 * summary['find_batch/failed'] // 6}"))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
