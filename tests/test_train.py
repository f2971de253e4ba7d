"""train.py from end to end: a whole run, every file of conf/, every experiment, SIGKILL and resume, Ctrl-C, sweeps."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from data_helpers import write_collection, write_lines
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

import train
from lightning_modules.callbacks import MetricsCSV
from lightning_modules.resolvers import CONF, REPOSITORY, register_resolvers
from retrieval.export import load_encoder

SMALL = [
    "model.config.num_hidden_layers=1", "model.config.hidden_size=16", "model.config.intermediate_size=16",
    "model.config.embedding_range=0.25", "model.max_query_length=16", "model.max_doc_length=32", "trainer=cpu",
    "batch.size=4", "calibrate.documents=8", "test.batch_size=16", "data.val_pool=12", "trainer.log_every_n_steps=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A collection of 30 documents with titles and 20 train queries, of which one is dev."""
    return write_collection(tmp_path_factory.mktemp("data") / "small")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")


def configuration(output: Path, *overrides: str) -> DictConfig:
    """The configuration of a run in this process."""
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", [f"paths.output_dir={output}", *overrides])


def command(*arguments: str) -> tuple[list[str], dict[str, str]]:
    """A run in a process of its own."""
    environ = {k: v for k, v in os.environ.items() if k != "SPARTON_TRACEBACK"} | {"OMP_NUM_THREADS": "1"}
    return [sys.executable, str(REPOSITORY / "train.py"), *arguments], environ


def start(*arguments: str) -> subprocess.Popen[str]:
    line, environ = command(*arguments)
    return subprocess.Popen(line, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def losses(output: Path) -> dict[int, str]:
    """Step to training loss, as the file has it; a step that stands there twice is an error."""
    with (output / "metrics.csv").open(newline="") as file:
        rows = [(int(row["step"]), row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]
    assert len(dict(rows)) == len(rows)
    return dict(rows)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Returns once it holds; fails with what the process said where that ended first."""
    for _ in range(1200):
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError("waited for two minutes")


def test_a_run_leaves_what_the_readme_says(folder, tmp_path, capsys):
    pytest.importorskip("wandb")
    data = ["data=beir", f"data.path={folder}", "data.title_pairs=0.5"]
    train.train(configuration(tmp_path, *SMALL, *data, "trainer.max_steps=8", "trainer.val_check_interval=4"))
    table = capsys.readouterr().out
    assert all(word in table for word in ("BM25", "untrained", "trained", "nDCG@10", "MRR@10", "recall@100", "FLOPS"))
    summary = json.loads((tmp_path / "summary.json").read_text())
    measures = ("ndcg@10", "mrr@10", "recall@100", "recall@1000")
    sparsity = ("active_dims_query", "active_dims_doc", "flops")
    expected = {f"bm25/test/{name}" for name in measures}
    expected |= {f"{row}test/{name}" for row in ("", "untrained/") for name in (*measures, *sparsity)}
    expected |= {f"val_pool/{name}" for name in (*measures, *sparsity)}
    expected |= {"perf/step_ms", "perf/tokens_per_sec", "perf/batch_size", "perf/warmup_s", "perf/head_share"}
    expected.add("perf/peak_rss_mib")  # SMALL asks for the CPU
    expected |= {"perf/samples_per_sec", "status", "head", "device", "commit", "torch_version", "best_checkpoint"}
    assert expected <= summary.keys()
    assert (summary["status"], summary["head"]) == ("finished", "tiled")
    assert len(losses(tmp_path)) == 8
    for name in ("run.trec", "expansions.csv", "checkpoints/best.ckpt", "checkpoints/last.ckpt"):
        assert (tmp_path / name).exists(), name
        assert str(tmp_path) in table
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))

    # What was evaluated is the best checkpoint, and it is what model/ holds.
    exported, best = load_encoder(tmp_path / "model", head="tiled"), load_encoder(summary["best_checkpoint"])
    batch = best.doc_tokenizer(["gene cell protein", "brain"])
    with torch.inference_mode():
        torch.testing.assert_close(exported.eval()(batch), best.eval()(batch))


@pytest.mark.parametrize("logger", ["csv", "default"])
def test_without_wandb(logger, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    data = ["data=beir", f"data.path={folder}", "test.enabled=false", f"logger={logger}"]
    train.train(configuration(tmp_path, *SMALL, *data, "trainer.max_steps=2", "trainer.val_check_interval=2"))
    assert len(losses(tmp_path)) == 2 and not (tmp_path / "wandb").exists()


def test_precision_bf16_and_accumulation(folder, tmp_path):
    data = ["data=beir", f"data.path={folder}", "test.untrained=false", "logger=csv", "trainer.precision=bf16-mixed"]
    steps = ["trainer.max_steps=3", "trainer.accumulate_grad_batches=2", "trainer.val_check_interval=4"]
    train.train(configuration(tmp_path, *SMALL, *data, *steps))
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 3
    assert json.loads((tmp_path / "summary.json").read_text())["test/active_dims_doc"] > 0


GROUPS = {
    group: sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    for group in ("head", "loss", "data", "optimizer", "scheduler", "trainer", "callbacks", "logger", "debug", "recipe")
}
CHOICES = [(group, option) for group, options in GROUPS.items() for option in options]
CHOICES += [(f"regularizer@regularizer.{side}", path.stem)
            for side in ("query", "doc") for path in (CONF / "regularizer").glob("*.yaml")]  # fmt: skip


def test_no_group_of_conf_is_forgotten():
    elsewhere = {"model", "regularizer", "experiment", "paths", "hydra"}  # models: test_models.py
    assert {path.name for path in CONF.iterdir() if path.is_dir()} == GROUPS.keys() | elsewhere


def files_for(option: str, tmp_path: Path) -> list[str]:
    """What a data option needs on disk, and the path to it."""
    if option == "hf":
        datasets = pytest.importorskip("datasets")
        rows = {"query": ["a b", "c d"] * 4, "positive": ["e f", "g h"] * 4}
        datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "hf"))
        return [f"data.path={tmp_path / 'hf'}"]
    if option == "beir":
        return [f"data.path={write_collection(tmp_path / 'beir')}"]
    if option == "triples":
        path = write_lines(tmp_path / "triples.tsv", [f"query {i}\tgood {i}\tbad {i}" for i in range(12)])
        return [f"data.path={path}"]
    if option == "hard_negatives":
        lines = [{"query": f"query {i}", "pos": [f"good {i}"], "neg": [f"bad {i}"]} for i in range(12)]
        return [f"data.path={write_lines(tmp_path / 'hard.jsonl', [json.dumps(line) for line in lines])}",
                "data.negatives=1"]  # fmt: skip
    return ["data.size=64"] if option == "synthetic" else []


@pytest.mark.parametrize(("group", "option"), CHOICES, ids=lambda value: str(value))
def test_every_choice_is_composed_and_instantiated(group, option, tmp_path):
    choice = "model" if group == "recipe" else group
    needs = files_for(option, tmp_path) if group == "data" else []
    unlogged = [] if group == "logger" else ["logger=csv"]
    small = [text for text in SMALL[:-1] if text != "trainer=cpu"]
    cfg = configuration(tmp_path, *small, f"{choice}={option}", *needs, *unlogged)
    if option == "gpu" and not torch.cuda.is_available():
        with pytest.raises(ValueError, match="trainer.accelerator=gpu: expected a CUDA device, found none"):
            train.build(cfg)
        return
    module, datamodule, trainer = train.build(cfg)
    assert datamodule.describe()
    assert trainer.max_steps == cfg.trainer.max_steps and trainer.callbacks
    assert any(isinstance(logger, MetricsCSV) for logger in trainer.loggers) == (option != "wandb")
    assert cfg.head.name in ("auto", module.encoder.head_name)


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "experiment").glob("*.yaml")))
def test_every_experiment_trains_two_steps(name, tmp_path):
    cut = ["trainer.max_steps=2", "trainer.val_check_interval=2", "test.enabled=false"]
    train.train(configuration(tmp_path, f"experiment={name}", "model=tiny", *SMALL, *cut, "logger=csv"))
    assert len(losses(tmp_path)) == 2
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "finished"


def test_killed_in_an_epoch_and_resumed_gives_the_same_losses(folder, tmp_path):
    """Worker processes, dropout and an accumulation over two batches make it as hard as it gets."""
    arguments = [
        *SMALL, "data=beir", f"data.path={folder}", "data.title_pairs=0.9", "data.num_workers=1", "model.dropout=0.1",
        "data.negatives=1", "logger=csv", "test.enabled=false", "trainer.max_steps=60", "trainer.val_check_interval=26",
        "trainer.accumulate_grad_batches=2", "callbacks.checkpoint.save_every_steps=3",
    ]  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    killed = start(*arguments, f"hydra.run.dir={cut}")
    wait_for(lambda: (cut / "metrics.csv").exists() and len(losses(cut)) >= 20, killed)
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    last = cut / "checkpoints" / "last.ckpt"
    taken = torch.load(last, weights_only=True)
    assert 0 < taken["resume_state"]["loaders"][0]["batches"] < 95  # an epoch has 95
    assert 3 <= taken["global_step"] < 60
    resumed, straight = (
        start(*arguments, f"hydra.run.dir={path}", *extra)
        for path, extra in ((cut, [f"ckpt_path={last}"]), (whole, []))
    )
    for process in (resumed, straight):
        output = process.communicate(timeout=200)
        assert process.returncode == 0, output
    assert losses(cut) == losses(whole) and len(losses(whole)) == 60
    first, second = (torch.load(path / "checkpoints/last.ckpt", weights_only=True) for path in (cut, whole))
    for name, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][name]), name


def test_ctrl_c_saves_finishes_wandb_and_exits_130(folder, tmp_path):
    pytest.importorskip("wandb")
    out = tmp_path / "out"
    process = start(
        *SMALL, "data=beir", f"data.path={folder}", "trainer.max_steps=5000", "trainer.val_check_interval=5000",
        "test.enabled=false", f"hydra.run.dir={out}",
    )  # fmt: skip
    wait_for(lambda: (out / "metrics.csv").exists() and len(losses(out)) >= 3, process)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=100)
    assert process.returncode == 130, (stdout, stderr)
    assert "Traceback" not in stderr and stderr.splitlines()[-1] == "interrupted"
    assert json.loads((out / "summary.json").read_text())["status"] == "interrupted"
    assert torch.load(out / "checkpoints/last.ckpt", weights_only=True)["global_step"] >= 3
    assert list((out / "wandb").glob("offline-run-*/*.wandb"))


def test_a_sweep_of_bad_data_says_one_line_each_and_runs_the_rest(folder, tmp_path):
    bad = {name: write_collection(tmp_path / name) for name in ("unknown", "json", "text", "none", "query")}
    (bad["unknown"] / "qrels/train.tsv").write_text("query-id\tcorpus-id\tscore\ntrain0\tnowhere\t1\ntrain1\td1\t1\n")
    with (bad["json"] / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "d99", "text": \n')
    with (bad["text"] / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "d99", "title": "", "text": " "}\n')
    rows = (bad["query"] / "qrels/train.tsv").read_text()
    (bad["query"] / "qrels/train.tsv").write_text(rows + "train99\td1\t1\n")
    for path in bad["none"].glob("*.jsonl"):
        path.unlink()
    paths = [*bad.values(), tmp_path / "missing", folder]
    line, environ = command(
        "-m", *SMALL, "data=beir", f"data.path={','.join(map(str, paths))}", "trainer.max_steps=2", "logger=csv",
        "trainer.val_check_interval=2", "test.untrained=false", f"hydra.sweep.dir={tmp_path / 'sweep'}",
    )  # fmt: skip
    done = subprocess.run(line, env=environ, text=True, capture_output=True, timeout=250, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: job ")]
    assert len(lines) == 6
    for text, parts in zip(
        lines,
        (("nowhere",), ("corpus.jsonl line 31",), ("d99",), ("corpus.jsonl",), ("train99",), ("missing",)),
        strict=True,
    ):
        assert all(part in text for part in parts), text
    summaries = [json.loads((tmp_path / f"sweep/{job}/summary.json").read_text()) for job in range(7)]
    assert [summary["status"] for summary in summaries] == ["failed"] * 6 + ["finished"]
    assert all(summary["error"] for summary in summaries[:6])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=minilm", "model.packaged=null"], "model.name_or_path.*local directory.*model.pretrained=false"),
        (["model=tiny", "model.name_or_path={tmp}", "model.pretrained=true"], "{tmp}"),
        (["head=sparton"], "head=sparton: expected a CUDA device, got the CPU; use head=auto"),
        (["trainer.precision=16-mixed"], "trainer.precision=16-mixed: half precision"),
        (["optimizer.lr=-1"], "optimizer.lr must be positive, got -1"),
        (["ckpt_path={tmp}/absent.ckpt"], "absent.ckpt"),
        (["batch.size=0"], "batch"),
    ],
)
def test_bad_arguments(overrides, message, folder, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    base = [f"data.path={folder}", "logger=csv", "trainer=cpu", "test.enabled=false", "data.val_pool=12"]
    with pytest.raises(Exception) as error:  # noqa: PT011 - Hydra's wrapper for what a class refused
        train.train(configuration(tmp_path, *base, *(text.format(tmp=tmp_path) for text in overrides)))
    cause = error.value.__cause__ or error.value
    assert isinstance(cause, (ValueError, OSError)), repr(cause)
    assert "\n" not in str(cause)
    assert re.search(message.format(tmp=tmp_path), str(cause)), str(cause)


def test_a_checkpoint_of_another_vocabulary_is_one_line(folder, tmp_path):
    data = [*SMALL, "data=beir", f"data.path={folder}", "test.enabled=false", "logger=csv", "calibrate.documents=0"]
    data += ["trainer.max_steps=1", "trainer.val_check_interval=1"]
    train.train(configuration(tmp_path / "first", *data))
    other = ["model.config.vocab_size=16064", f"ckpt_path={tmp_path / 'first/checkpoints/last.ckpt'}"]
    with pytest.raises(ValueError, match="expected a vocabulary and hidden size of .16064, 16., got .16000, 16."):
        train.train(configuration(tmp_path / "second", *data, *other))
