"""Sweeps: presets and documented commands compose; a search whose trials run in other processes."""

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
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from lightning_modules import sweeps
from lightning_modules.launch import main
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
PARAMS = {
    path.stem: found["hydra"]["sweeper"]["params"]
    for path in sorted((CONF / "experiment").glob("*.yaml"))
    if "sweeper" in (found := yaml.safe_load(path.read_text())).get("hydra", {})
}


def run(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A process with the repository on its path."""
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, env=env, text=True, capture_output=True, timeout=200, check=False)


def commands() -> list[str]:
    """Every `python train.py ...` of docs/sweeps.md."""
    page = (REPOSITORY / "docs/sweeps.md").read_text()
    return sorted(set(re.findall(r"python train\.py -m ([^`\n]*)", page)))


def check_last(arguments: list[str]) -> None:
    """Composes the last job of a sweep; that every swept option of a group is there costs no composition."""
    job = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        values = [value] if value.startswith(("[", "tag(")) else value.split(",")
        if (CONF / key).is_dir() and not value.startswith("["):
            assert all((CONF / key / f"{name}.yaml").exists() for name in values), argument
        job.append(f"{key}={values[-1]}")
    check_overrides(CONF, "train", job)


def test_documented_commands_compose():
    assert len(commands()) >= 12
    for arguments in commands():
        check_last([word for word in shlex.split(arguments) if not word.startswith("hydra")])


def test_sweep_presets_compose():
    assert set(PARAMS) == {"heads", "lengths", "sparsity", "vocabulary"}
    for name, params in PARAMS.items():
        check_last([f"experiment={name}", *(f"{key}={values}" for key, values in params.items())])


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
        script, "-m", "hydra/sweeper=search", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2",
        "hydra.sweeper.n_jobs=3", "hydra.sweeper.n_trials=3", "head=tiled", f"hydra.sweep.dir={out}",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in done.stderr
    own = r"flops_weight=[\d.e-]+,optimizer.lr=[\d.e-]+"
    assert re.match(rf"error: job 1 \({own}\) failed: loss.scale: expected", lines[0])
    found = yaml.safe_load((out / "optimization_results.yaml").read_text())
    values = [json.loads((out / f"{job}/summary.json").read_text())["val_pool/ndcg@10"] for job in (0, 2)]
    assert found["best_value"] == max(values)


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


def test_a_sweep_under_torchrun_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(sys, "argv", ["task.py", "-m", "seed=1,2"])
    with pytest.raises(SystemExit) as end:
        main(lambda cfg: None, config_name="train")
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 1 and len(lines) == 1 and "LOCAL_RANK" in lines[0]


def test_the_objective_is_read_from_the_summary(tmp_path):
    cfg = OmegaConf.create({"objective": "val_pool/ndcg@10"})
    assert sweeps.read_objective(cfg, tmp_path) is None
    write_summary(tmp_path, {"val_pool/ndcg@10": 0.5})
    assert sweeps.read_objective(cfg, tmp_path) == 0.5
    assert sweeps.read_objective(OmegaConf.create({"objective": "test/none"}), tmp_path) is None
    assert sweeps.read_objective(OmegaConf.create({}), tmp_path) is None
