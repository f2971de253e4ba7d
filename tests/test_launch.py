"""launch: sweeps that survive failures, one-line errors, interrupts, summaries, precision."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from lightning_modules import environment as environment_module
from lightning_modules.environment import use_expandable_segments
from lightning_modules.errors import drop_frames
from lightning_modules.launch import _clean_up, environment, resolve_precision, write_summary
from lightning_modules.overrides import check_overrides
from lightning_modules.resolvers import CONF, REPOSITORY
from lightning_modules.wandb import choose_mode

SCRIPT = """
import os, signal, sys
import torch
from lightning_modules.launch import main

def fit(cfg):
    import lightning as L
    from lightning.pytorch.demos.boring_classes import BoringModel
    from lightning_modules.callbacks import SafeCheckpoint

    class Interrupted(BoringModel):
        def training_step(self, batch, batch_idx):
            if self.global_step == 2:
                os.kill(os.getpid(), getattr(signal, os.environ["SIGNAL"]))
            return super().training_step(batch, batch_idx)

    folder = cfg.paths.output_dir
    L.Trainer(max_steps=10, logger=False, callbacks=[SafeCheckpoint(folder)], default_root_dir=folder,
              accelerator="cpu", enable_progress_bar=False, enable_model_summary=False).fit(Interrupted())

def task(cfg):
    print("ran", cfg.head.name, flush=True)
    if cfg.head.name == "naive":
        raise torch.OutOfMemoryError("CUDA out of memory.\\nTried to allocate 2 GiB")
    if cfg.head.name == "compiled":
        raise ValueError("loss.scale: expected a positive number, got -1")
    if cfg.head.name == "sparton":
        if os.environ["PHASE"] == "before":
            os.kill(os.getpid(), getattr(signal, os.environ["SIGNAL"]))
        fit(cfg)

if __name__ == "__main__":
    main(task, config_name="train")
"""


def run(folder: Path, *arguments: str, script: str = SCRIPT, **environ: str) -> subprocess.CompletedProcess[str]:
    """Runs a script that calls launch.main in a process of its own, with ``folder`` as its working directory."""
    (folder / "task.py").write_text(script)
    env = {k: v for k, v in os.environ.items() if k != "SPARTON_TRACEBACK"}
    path = os.pathsep.join(filter(None, [str(REPOSITORY), env.get("PYTHONPATH")]))
    env |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environ
    command = [sys.executable, "task.py", *arguments]
    return subprocess.run(command, cwd=folder, env=env, text=True, capture_output=True, timeout=120, check=False)


def test_a_sweep_survives_failing_jobs(tmp_path: Path) -> None:
    done = run(tmp_path, "-m", "head=naive,compiled,tiled", "hydra.sweep.dir=sweep")
    assert done.returncode == 1
    assert "ran tiled" in done.stdout
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 2 and "Traceback" not in done.stderr
    assert "job 0 (head=naive) failed: OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB" in lines[0]
    assert "job 1 (head=compiled) failed: loss.scale: expected a positive number, got -1" in lines[1]
    summary = json.loads((tmp_path / "sweep/0/summary.json").read_text())
    assert summary["status"] == "failed" and summary["error"].startswith("OutOfMemoryError") and summary["torch_version"]
    assert "Traceback" in (tmp_path / "sweep/0/error.txt").read_text()
    assert not (tmp_path / "sweep/2/error.txt").exists()


def test_a_single_run_fails_with_one_line_and_a_traceback_on_demand(tmp_path: Path) -> None:
    done = run(tmp_path, "head=compiled", "hydra.run.dir=one", SPARTON_TRACEBACK="1")
    assert done.returncode == 1 and "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: loss.scale: expected a positive number, got -1")
    assert json.loads((tmp_path / "one/summary.json").read_text())["status"] == "failed"


@pytest.mark.parametrize(("name", "phase"), [("SIGINT", "fit"), ("SIGTERM", "fit"), ("SIGTERM", "before")])
def test_a_signal_saves_and_stops_the_sweep(name: str, phase: str, tmp_path: Path) -> None:
    done = run(tmp_path, "-m", "head=sparton,tiled", "hydra.sweep.dir=sweep", SIGNAL=name, PHASE=phase)
    assert done.returncode == 130, done.stderr
    assert "ran tiled" not in done.stdout and "Traceback" not in done.stderr
    assert json.loads((tmp_path / "sweep/0/summary.json").read_text())["status"] == "interrupted"
    last = tmp_path / "sweep/0/last.ckpt"
    assert last.exists() == (phase == "fit")
    if last.exists():
        assert torch.load(last, weights_only=True)["global_step"] == 3  # the step in hand was finished


def test_misspelt_arguments_are_one_line_without_a_job(tmp_path: Path) -> None:
    done = run(tmp_path, "trainer.max_stpes=3")
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1 and "trainer.max_steps" in done.stderr
    assert not (tmp_path / "outputs").exists()


def test_help_shows_groups_options_and_examples(tmp_path: Path) -> None:
    done = run(tmp_path, "--help")
    assert done.returncode == 0
    assert "head: auto, compiled, naive, sparton, tiled" in done.stdout
    examples = done.stdout.split("Examples:")[1].split("More:")[0]
    assert examples.count("python train.py") == 3 and "python train.py -m" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["modle=tiny"], ["modle=tiny", "did you mean model"]),
        (["head=spartn"], ["head=spartn", "did you mean sparton", "tiled"]),
        (["head=naive,spartn"], ["head=spartn", "did you mean sparton"]),
        (["trainer.max_stpes=3,4", "seed=1,2"], ["trainer.max_stpes=3: ", "trainer.max_steps"]),
        (["max_steps=3"], ["max_steps=3", "trainer.max_steps"]),
        (["regularizer@regularizer.doc=l11"], ["regularizer@regularizer.doc=l11", "l1"]),
        (["loss=kl,infonce", "loss.losses.contrastive.temperature=2"], ["loss.losses.contrastive"]),
        (["data=beir"], ["data.path", "data.path=VALUE"]),
        (["head=["], ["head=["]),
        (["head"], ["head: expected KEY=VALUE"]),
    ],
)
def test_wrong_arguments(arguments: list[str], expected: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        check_overrides(CONF, "train", arguments)
    assert "\n" not in str(error.value)
    for text in expected:
        assert text in str(error.value)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["head=sparton,tiled", "seed=1,2", "optimizer.lr=1e-4"],
        ["+trainer.fast_dev_run=true", "~callbacks.memory"],
        ["callbacks=early_stopping", "logger=csv", "debug=profile", "scheduler=cosine", "trainer=gpu"],
        ["hydra.run.dir=x", "regularizer@regularizer.query=none"],
    ],
)
def test_right_arguments(arguments: list[str]) -> None:
    check_overrides(CONF, "train", arguments)


@pytest.mark.parametrize("choice", ["callbacks=default", "callbacks=early_stopping", "callbacks=none", "logger=csv"])
def test_configured_objects_are_built(choice: str, tmp_path: Path) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [choice, f"paths.output_dir={tmp_path}"])
    group = choice.split("=")[0]
    built = instantiate(cfg[group])
    assert set(built) == set(cfg[group])
    assert Path(cfg.paths.data_dir) == REPOSITORY / "data"


def test_every_file_of_conf_is_yaml() -> None:
    for path in CONF.rglob("*.yaml"):
        assert path.read_text().startswith("#"), f"{path}: say in the first line what it is"
        yaml.safe_load(path.read_text())


def test_summary_is_flat_whole_and_valid_json(tmp_path: Path) -> None:
    figures = {"a": float("nan"), "b": torch.tensor(2.0), "c": None, "d": "x", "e": 3, "f": tmp_path, "g": float("inf")}
    path = write_summary(tmp_path / "new", figures)
    assert json.loads(path.read_text()) == {
        "a": None, "b": 2.0, "c": None, "d": "x", "e": 3, "f": str(tmp_path), "g": None
    }  # fmt: skip
    with pytest.raises(TypeError, match="summary: a must be"):
        write_summary(tmp_path / "new", {"a": [1]})
    assert json.loads(path.read_text())["e"] == 3
    assert os.listdir(tmp_path / "new") == ["summary.json"]


def test_environment_names_versions_and_device(monkeypatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    found = environment()
    assert found["torch_version"] and found["lightning_version"] and found["device"]
    assert found["alloc_conf"] == "expandable_segments:True"
    assert {"python_version", "triton_version", "transformers_version", "commit", "date"} <= set(found)


@pytest.mark.parametrize(
    ("given", "gpu", "expected"),
    [
        ({}, True, "expandable_segments:True"), ({}, False, None), ({"PYTORCH_CUDA_ALLOC_CONF": ""}, True, None),
        ({"PYTORCH_CUDA_ALLOC_CONF": "a:1", "PYTORCH_ALLOC_CONF": "b:1"}, True, "a:1"),
    ],  # fmt: skip
)
def test_segments_grow_on_a_gpu_unless_the_environment_says_otherwise(given, gpu, expected, monkeypatch) -> None:
    monkeypatch.setattr(os, "environ", dict(given))
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr("sys.platform", "linux")
    use_expandable_segments()
    assert environment_module._alloc_conf() == expected


def test_precision_on_the_cpu() -> None:
    assert resolve_precision("auto", "cpu") == "32-true"
    assert resolve_precision(32, "cpu") == "32-true"
    assert resolve_precision("bf16-mixed", "cpu") == "bf16-mixed"
    with pytest.raises(ValueError, match="trainer.precision=16-mixed"):
        resolve_precision("16-mixed", "cpu")
    with pytest.raises(ValueError, match="expected auto or one of"):
        resolve_precision("fp8", "cpu")


def test_precision_on_a_gpu_without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = environment_module.torch.cuda
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "is_bf16_supported", lambda including_emulation=True: False)
    monkeypatch.setattr(cuda, "get_device_name", lambda: "an old card")
    assert resolve_precision("auto", "auto") == "32-true"
    assert resolve_precision("16-mixed", "gpu") == "16-mixed"
    with pytest.raises(ValueError, match="an old card has no bfloat16"):
        resolve_precision("bf16-mixed", "gpu")
    monkeypatch.setattr(cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="use trainer=cpu"):
        resolve_precision("auto", "gpu")


def test_wandb_mode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    assert choose_mode() == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + "0" * 40)
    assert choose_mode() == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert choose_mode() == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert choose_mode() == "disabled"


def test_frames_of_an_error_let_go_of_their_tensors() -> None:
    class Held:
        alive = 0

        def __init__(self) -> None:
            Held.alive += 1

        def __del__(self) -> None:
            Held.alive -= 1

    def inner() -> None:
        held = Held()  # noqa: F841 - kept alive by the frame
        raise RuntimeError("inner")

    def outer() -> None:
        try:
            inner()
        except RuntimeError as error:
            held = Held()  # noqa: F841
            raise ValueError("outer") from error

    try:
        outer()
    except ValueError as error:
        kept = error
    assert Held.alive == 2
    drop_frames(kept)
    assert Held.alive == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_job_after_one_out_of_memory_has_the_same_peak_as_alone() -> None:
    def work() -> tuple[int, int]:
        x = torch.randn(2048, 2048, device="cuda", requires_grad=True)
        (x @ x).relu().sum().backward()
        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()

    work()
    _clean_up(exit_code=0)
    alone = work()
    _clean_up(exit_code=0)
    try:
        kept = [torch.empty(2**30, device="cuda") for _ in range(4)]
        kept.append(torch.empty(2**45, dtype=torch.uint8, device="cuda"))
    except torch.OutOfMemoryError as error:
        del kept
        drop_frames(error)
    _clean_up(exit_code=1)
    assert work() == alone
