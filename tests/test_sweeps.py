"""Sweeps: presets and documented commands compose; jobs in other processes; trainings of two processes; a search."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from data_helpers import write_collection
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from lightning_modules import sweeps
from lightning_modules.overrides import check_overrides
from lightning_modules.resolvers import CONF, REPOSITORY
from lightning_modules.summary import write_summary

# Trial 1 fails; the others are the better the nearer the weight is to 0.02.
SCRIPT = """
from hydra.core.hydra_config import HydraConfig
from lightning_modules.launch import main
from lightning_modules.summary import write_summary

def task(cfg):
    if HydraConfig.get().job.num == 1:
        raise ValueError("loss.scale: expected a positive number, got -1")
    write_summary(cfg.paths.output_dir, {"status": "finished", "val_pool/ndcg@10": 1 - abs(cfg.flops_weight - 0.02)})

if __name__ == "__main__":
    main(task, config_name="train")
"""
SMALL = [
    "model.config.num_hidden_layers=1", "model.config.hidden_size=16", "model.config.intermediate_size=16",
    "model.max_query_length=16", "model.max_doc_length=32", "trainer=cpu", "batch.size=4", "calibrate.documents=8",
    "data.val_pool=12", "trainer.log_every_n_steps=1", "trainer.max_steps=2", "trainer.val_check_interval=2",
    "logger=csv", "test.untrained=false",
]  # fmt: skip
PARAMS = {
    path.stem: found["hydra"]["sweeper"]["params"]
    for path in sorted((CONF / "experiment").glob("*.yaml"))
    if "sweeper" in (found := yaml.safe_load(path.read_text())).get("hydra", {})
}


def run(script: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """A process with the repository on its path."""
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environ
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, env=env, text=True, capture_output=True, timeout=200, check=False)


def commands() -> list[str]:
    """Every `python train.py ...` of the pages that a reader would copy from."""
    pages = [(REPOSITORY / name).read_text() for name in ("README.md", "docs/sweeps.md")]
    return sorted({line.split("#")[0].strip() for page in pages for line in re.findall(r"python train\.py ([^`\n]*)", page)})


@pytest.mark.parametrize("arguments", commands())
def test_documented_commands_compose(arguments):
    check_overrides(CONF, "train", [word for word in shlex.split(arguments) if not word.startswith("-")])


def test_sweep_presets_compose_with_each_of_their_values():
    assert set(PARAMS) == {"heads", "lengths", "sparsity", "vocabulary"}
    for name, params in PARAMS.items():
        check_overrides(CONF, "train", [f"experiment={name}", *(f"{key}={values}" for key, values in params.items())])


@pytest.mark.parametrize(
    ("choice", "node", "module"),
    [
        ("hydra/launcher=joblib", "launcher", "hydra_joblib_launcher"),
        ("hydra/launcher=submitit_slurm", "launcher", "hydra_submitit_launcher"),
        ("hydra/launcher=submitit_local", "launcher", "hydra_submitit_launcher"),
        ("hydra/sweeper=search", "sweeper", "hydra_optuna_sweeper"),
    ],
)
def test_launchers_and_sweepers_compose(choice, node, module):
    pytest.importorskip(f"hydra_plugins.{module}")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [choice], return_hydra_config=True)
    assert module in cfg.hydra[node]._target_
    if choice == "hydra/sweeper=search":
        assert (cfg.hydra.sweeper.direction, cfg.hydra.sweeper.sampler.seed) == ("maximize", 42)
        params = [f"{key}={value}" for key, value in cfg.hydra.sweeper.params.items()]
        check_overrides(CONF, "train", params)


def test_a_search_in_other_processes_survives_a_failing_trial(tmp_path):
    for name in ("hydra_joblib_launcher", "hydra_optuna_sweeper"):
        pytest.importorskip(f"hydra_plugins.{name}")
    script, out = tmp_path / "task.py", tmp_path / "sweep"
    script.write_text(SCRIPT)
    out.mkdir()
    (out / "failures.txt").write_text("job 7 of an earlier sweep\n")
    done = run(
        script, "-m", "hydra/sweeper=search", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweeper.n_jobs=3",
        "hydra.sweeper.n_trials=3", "head=tiled", f"hydra.sweep.dir={out}",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in done.stderr
    assert re.match(r"error: job 1 \(flops_weight=[\d.e-]+,optimizer.lr=[\d.e-]+\) failed: loss.scale: expected", lines[0])
    found = yaml.safe_load((out / "optimization_results.yaml").read_text())
    values = [json.loads((out / f"{job}/summary.json").read_text())["val_pool/ndcg@10"] for job in (0, 2)]
    assert found["best_value"] == max(values)


def test_a_sweep_of_trainings_of_two_processes_runs_each_job_once(tmp_path):
    folder, out = write_collection(tmp_path / "data"), tmp_path / "a = sweep"
    done = run(
        REPOSITORY / "train.py", "-m", *SMALL, "data=beir", f"data.path={folder}", "trainer.devices=2",
        "batch.size=4,1000", f'hydra.sweep.dir="{out}"',
    )  # fmt: skip
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: job 1 (batch.size=1000) failed: batch.size: expected at least one batch for each of 2")
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["0", "1"]
    summary = json.loads((out / "0/summary.json").read_text())
    assert (summary["status"], summary["world_size"]) == ("finished", 2) and summary["test/ndcg@10"] > 0
    assert json.loads((out / "1/summary.json").read_text())["status"] == "failed"
    rows = (out / "0/metrics.csv").read_text().splitlines()
    steps = [int(row.split(",")[0]) for row in rows[1:]]
    assert steps == sorted(steps) and max(map(steps.count, steps)) <= 3  # training, validation and the end, once each
    assert done.stdout.count("step 2/2") == 1 and done.stdout.count("│ trained") == 1
    assert "sync_dist" not in done.stderr


@pytest.mark.parametrize(
    ("trainer", "several"),
    [
        ({}, False), ({"devices": 1}, False), ({"devices": "1"}, False), ({"devices": [3]}, False),
        ({"devices": 2}, True), ({"devices": [0, 1]}, True), ({"devices": "auto"}, True), ({"devices": -1}, True),
        ({"devices": 1, "num_nodes": 2}, True),
    ],
)  # fmt: skip
def test_which_jobs_have_several_processes(trainer, several):
    assert sweeps.several_processes(OmegaConf.create({"trainer": trainer})) is several
    assert not sweeps.several_processes(OmegaConf.create({}))  # evaluate.py has no trainer


def test_a_sweep_under_torchrun_is_refused(tmp_path):
    (tmp_path / "task.py").write_text(SCRIPT)
    done = run(tmp_path / "task.py", "-m", "seed=1,2", f"hydra.sweep.dir={tmp_path / 'sweep'}", LOCAL_RANK="1")
    assert done.returncode == 1 and not (tmp_path / "sweep").exists()
    assert len(done.stderr.splitlines()) == 1 and "LOCAL_RANK" in done.stderr


def test_the_objective_is_read_from_the_summary(tmp_path):
    cfg = OmegaConf.create({"objective": "val_pool/ndcg@10"})
    assert sweeps.read_objective(cfg, tmp_path) is None
    write_summary(tmp_path, {"val_pool/ndcg@10": 0.5})
    assert sweeps.read_objective(cfg, tmp_path) == 0.5
    assert sweeps.read_objective(OmegaConf.create({"objective": "test/none"}), tmp_path) is None
    assert sweeps.read_objective(OmegaConf.create({}), tmp_path) is None
