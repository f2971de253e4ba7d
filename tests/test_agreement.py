"""benchmarks/agreement.py: made-up runs that agree and that don't, and one line for runs that can't be compared."""

from __future__ import annotations

import csv
import json
import math
import statistics
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from benchmarks import agreement
from tests.data_helpers import ROOT

NAIVE = {1: 0.80, 2: 0.82, 3: 0.84}
ENVIRONMENT = {"device": "a card", "torch_version": "2.11", "triton_version": "3.6", "commit": "abc"}


def write_run(folder, head, seed, quality, *, losses=(2.0, 1.0), dataset="xquad", status="finished", **settings):
    """A folder such as train.py leaves behind."""
    summary = {"status": status, "head": head, "test/ndcg@10": quality, "test/mrr@10": quality, "test/recall@100": 1.0}
    summary |= {"test/ndcg@10/de": quality - 0.1, "untrained/test/ndcg@10": 0.4, "untrained/test/ndcg@10/de": 0.3}
    (folder / ".hydra").mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary | ENVIRONMENT))
    config = {
        "seed": seed, "head": {"name": head}, "model": {"name_or_path": "small"}, "ckpt_path": None,
        "data": {"_target_": "x", "path": f"${{paths.data_dir}}/{dataset}"}, "paths": {"output_dir": str(folder)},
        "trainer": {"precision": "32-true"}, "optimizer": {"lr": 1e-3} | settings,
    }  # fmt: skip
    OmegaConf.save(config, folder / ".hydra" / "config.yaml")
    rows = [f"{step},{loss},\n" for step, loss in enumerate(losses)]
    (folder / "metrics.csv").write_text("step,train/loss,val_pool/ndcg@10\n" + "".join(rows) + "1,,0.5\n")


def write_study(folder, sparton, losses=None, **more):
    """Three seeds of both heads; ``sparton``: seed -> quality."""
    for seed, quality in NAIVE.items():
        write_run(folder / f"naive{seed}", "naive", seed, quality, **more)
    for seed, quality in sparton.items():
        write_run(folder / f"sparton{seed}", "sparton", seed, quality, losses=losses or (2.0, 1.0), **more)


def tables(folder, *arguments):
    """Exit status and both tables."""
    quality, losses = folder / "out" / "quality.csv", folder / "out" / "losses.csv"
    status = agreement.main([str(folder), "--quality", str(quality), "--losses", str(losses), *arguments])
    return status, *(list(csv.DictReader(path.read_text().splitlines())) for path in (quality, losses))


def test_equal_quality_and_agreeing_losses(tmp_path, capsys):
    write_study(tmp_path, {1: 0.81, 2: 0.83, 3: 0.85}, losses=(2.0, 1.005))
    status, quality, losses = tables(tmp_path)
    assert status == 0
    runs = [row for row in quality if row["row"] == "run" and row["language"] == "all"]
    assert [(row["head"], row["seed"]) for row in runs] == [(h, s) for h in ("naive", "sparton") for s in "123"]
    assert [float(row["ndcg@10"]) for row in runs[:3]] == list(NAIVE.values())
    assert {row["untrained_ndcg@10"] for row in runs} == {"0.4"}
    mean = next(row for row in quality if row["row"] == "mean" and row["language"] == "de")
    assert float(mean["ndcg@10"]) == pytest.approx(0.72) and float(mean["sd"]) == pytest.approx(0.02)
    assert float(mean["range"]) == pytest.approx(0.04)
    verdicts = [row for row in quality if row["row"] == "verdict"]
    assert [row["language"] for row in verdicts] == ["all", "de"]
    for row in verdicts:
        assert row["verdict"] == "equal within the spread of the seeds"
        assert float(row["difference"]) == pytest.approx(0.01)
        assert float(row["allowed"]) == pytest.approx(2 * statistics.stdev(NAIVE.values()), rel=1e-5)
    assert [row["step"] for row in losses] == ["0", "1", "largest, 1"]
    assert [float(row["difference"]) for row in losses] == pytest.approx([0, 0.005, 0.005])
    assert float(losses[-1]["relative"]) == pytest.approx(0.005) and losses[-1]["verdict"].startswith("agree to 0.01")
    assert {row["seeds"] for row in losses} == {"3"} and {row["precision"] for row in losses} == {"32-true"}
    assert all(row[name] == value for row in quality + losses for name, value in ENVIRONMENT.items())
    assert "xquad small de: sparton against naive: +0.0100, equal" in capsys.readouterr().out


def test_another_quality_is_not_equal(tmp_path):
    write_study(tmp_path, {1: 0.85, 2: 0.87, 3: 0.89})  # 0.05 apart, two deviations are 0.04
    status, quality, _ = tables(tmp_path)
    assert status == 1
    verdicts = {row["language"]: row["verdict"] for row in quality if row["row"] == "verdict"}
    assert verdicts == dict.fromkeys(("all", "de"), "not equal within the spread of the seeds")


def test_a_seed_that_collapsed_makes_nothing_equal(tmp_path):
    """The spread that one bad seed brings would allow any difference."""
    write_study(tmp_path, {1: 0.80, 2: 0.83, 3: 0.10})
    status, quality, _ = tables(tmp_path)
    assert status == 1
    verdicts = {row["language"]: row["verdict"] for row in quality if row["row"] == "verdict"}
    assert verdicts == dict.fromkeys(("all", "de"), "undecided: the seeds spread too widely to tell")


@pytest.mark.parametrize("other", [(2.0, 1.02), (2.0, math.nan), (2.0, math.inf)])
def test_another_loss_does_not_agree(tmp_path, other):
    write_study(tmp_path, NAIVE, losses=other)
    status, _, losses = tables(tmp_path)
    assert status == 1 and losses[-1]["verdict"].startswith("do not agree")
    assert tables(tmp_path, "--rtol", "0.03")[0] == int(not math.isfinite(other[1]))


def test_runs_of_two_collections_are_two_studies(tmp_path):
    write_study(tmp_path / "a", NAIVE)
    write_study(tmp_path / "b", NAIVE, dataset="squad")
    _, quality, _ = tables(tmp_path)
    assert [row["dataset"] for row in quality if row["row"] == "verdict"] == ["squad", "squad", "xquad", "xquad"]


def test_one_seed_has_no_spread(tmp_path):
    for head in ("naive", "sparton"):
        write_run(tmp_path / head, head, 1, 0.8)
    status, quality, _ = tables(tmp_path)
    assert status == 1 and quality[-1]["verdict"] == "one seed: no spread to compare with"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"status": "failed"}, "expected a finished run of train.py, got status failed"),
        ({"seed": 1}, "the same dataset, model, head and seed as"),
        ({"lr": 2e-3}, "got other values of optimizer.lr; compare runs of one experiment"),
        ({}, "expected the head naive and another one with the same seeds"),
        ({"seed": 3, "quality": math.nan}, "expected a number for test/ndcg@10 in summary.json, got nan"),
        ({"seed": 3, "losses": (2.0,)}, "expected losses of 2 steps as in the others"),
        ({"seed": 3, "losses": ()}, "expected a column train/loss with numbers"),
    ],
)
def test_what_cannot_be_compared_is_one_line(tmp_path, extra, message):
    write_study(tmp_path, {1: 0.8, 2: 0.8})
    write_run(tmp_path / "extra", "sparton", **({"seed": 4, "quality": 0.8} | extra))
    with pytest.raises(SystemExit) as caught:
        tables(tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_command_line(tmp_path):
    command = [sys.executable, "-m", "benchmarks.agreement", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 2 and "--quality or --losses" in done.stderr
    done = subprocess.run([*command, "--quality", "q.csv"], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 1 and done.stderr.startswith("FOLDER: expected folders of finished runs")
