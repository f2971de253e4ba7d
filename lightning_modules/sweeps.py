"""What jobs of a sweep need that do not run in the sweep's own process, and what they bring back to it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

FAILURES = "failures.txt"
INTERRUPTED = 130  # exit status after Ctrl-C or SIGTERM

_folders: list[Path] = []  # of the sweep in this process


class JobError(Exception):
    """A job that ran apart has failed and recorded it."""


class SweepFolder(Callback):
    """Hydra's callback that tells the sweep's process which folder its jobs have in common."""

    def on_multirun_start(self, config: DictConfig, **kwargs: object) -> None:
        """Keeps the folder and forgets the failures of an earlier sweep in it."""
        _folders[:] = [Path(config.hydra.sweep.dir)]
        (_folders[0] / FAILURES).unlink(missing_ok=True)


def note_failure(sweep: Path, line: str) -> None:
    """Adds a job's failure to the sweep's; where that can't be written (a full disk), the job's own folder has it."""
    try:
        with (sweep / FAILURES).open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError:
        return


def failures_elsewhere() -> list[str]:
    """The failures of all jobs of this process's sweep, those in other processes included."""
    files = [folder / FAILURES for folder in _folders]
    return [line for file in files if file.exists() for line in file.read_text(encoding="utf-8").splitlines()]


def read_objective(cfg: DictConfig, folder: Path) -> float | None:
    """The figure of ``summary.json`` that ``objective`` names; None where either is missing."""
    name, path = OmegaConf.select(cfg, "objective"), folder / "summary.json"
    if name is None or not path.exists():
        return None
    return json.loads(path.read_text(encoding="utf-8")).get(name)


def several_processes(cfg: DictConfig) -> bool:
    """Whether the trainer may start processes (or is one of several that a cluster started)."""
    devices, nodes = (OmegaConf.select(cfg, f"trainer.{name}", default=1) for name in ("devices", "num_nodes"))
    if OmegaConf.is_list(devices):
        devices = len(devices)
    return str(devices) != "1" or str(nodes) != "1"


def refuse_torchrun() -> None:
    """Raises ValueError in a process of torchrun or its like: each of them would run the whole sweep."""
    if "LOCAL_RANK" in os.environ:
        raise ValueError(
            "-m: expected a process of its own for the sweep, got one of several (LOCAL_RANK is set), each of which"
            " would run every job; start it without torchrun, trainer.devices=N starts the processes of each job"
        )


def run_apart(script: str, settings: DictConfig) -> None:
    """Runs one job of a sweep as a run of its own, in a process of its own.

    Lightning starts the other processes of a run with the command line of the first. In a sweep that is the whole
    sweep's, so that each process would begin the sweep again; as a run of its own it is the job's. Nothing of the
    processes, their ports and their variables is left to the next job either.

    Args:
        script: absolute path of the entry point.
        settings: Hydra's, of the job.

    Raises:
        JobError: with the line that the job left in its ``summary.json``, if it failed.
        ChildProcessError: if it ended without one.
        KeyboardInterrupt: if it was interrupted.
    """
    folder = Path(settings.runtime.output_dir).absolute()
    run_dir = str(folder).replace("\\", "\\\\").replace('"', '\\"')
    command = [sys.executable, script, "--config-name", settings.job.config_name, *settings.overrides.task]
    # A group of its own: Ctrl-C reaches its processes through here, once, and this one waits until they have saved.
    process = subprocess.Popen([*command, f'hydra.run.dir="{run_dir}"'], process_group=0)
    status, interrupted = None, False
    while status is None:
        try:
            status = process.wait()
        except KeyboardInterrupt:
            interrupted = True
            os.killpg(process.pid, signal.SIGINT)
    if status == INTERRUPTED or interrupted:
        raise KeyboardInterrupt
    if status:
        summary = folder / "summary.json"
        found = json.loads(summary.read_text(encoding="utf-8")) if summary.exists() else {}
        if found.get("status") == "failed":
            raise JobError(found["error"])
        raise ChildProcessError(f"the processes of the job ended with exit status {status} and left no summary.json")
