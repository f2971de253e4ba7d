"""Runs a task with Hydra: sweeps that survive failing jobs, errors of one line, status 130 for Ctrl-C and SIGTERM."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import hydra
import torch
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig

from lightning_modules.environment import environment, resolve_precision, use_expandable_segments
from lightning_modules.errors import chain, drop_frames
from lightning_modules.overrides import check_overrides, one_line
from lightning_modules.resolvers import CONF, register_resolvers
from lightning_modules.summary import write_summary
from lightning_modules.sweeps import (
    INTERRUPTED,
    JobError,
    failures_elsewhere,
    note_failure,
    read_objective,
    refuse_torchrun,
    run_apart,
    several_processes,
)

__all__ = ["environment", "main", "resolve_precision", "write_summary"]

# Their messages say everything; any other error is named by its class too.
SPEAKING_ERRORS = (ValueError, TypeError, OSError, HydraException)
SHOW_TRACEBACK = "SPARTON_TRACEBACK"


@dataclass
class _Jobs:
    """Runs the task once for each job and remembers which ones failed.

    A launcher may run jobs in processes of their own (joblib, submitit): what they need travels in the fields, and
    failures come back in the sweep's folder.
    """

    task: Callable[[DictConfig], None]
    arguments: tuple[str, ...] = field(default_factory=lambda: (os.path.abspath(sys.argv[0]), *sys.argv[1:]))
    failures: list[str] = field(default_factory=list)

    def __call__(self, cfg: DictConfig) -> float | None:
        """Runs one job; an error is recorded in the job's folder and raised no further, an interrupt is.

        Returns:
            The figure that a search goes by: ``objective`` of the configuration, in ``summary.json``; None without.
        """
        use_expandable_segments()  # here and not in main: a launcher may run the job on another machine
        settings = HydraConfig.get()
        folder = Path(settings.runtime.output_dir)
        failed, interrupted = False, False
        try:
            if settings.mode == RunMode.MULTIRUN and several_processes(cfg):
                run_apart(self.arguments[0], settings)
            else:
                self.task(cfg)
        except (Exception, SystemExit) as error:
            interrupted = _is_interrupt(error)
            failed = not interrupted
            if failed:
                line = str(error) if isinstance(error, JobError) else _record_failure(folder, error)
                self._remember(line, settings)
            drop_frames(error)
        except KeyboardInterrupt as error:
            interrupted = True
            drop_frames(error)
        # Outside of the except blocks: there the error, and with it every tensor of its frames, would still be alive.
        if interrupted:
            _write(folder, {"status": "interrupted"} | environment())
        _clean_up(exit_code=INTERRUPTED if interrupted else int(failed))
        if interrupted:
            raise KeyboardInterrupt
        return None if failed else read_objective(cfg, folder)

    def _remember(self, line: str, settings: DictConfig) -> None:
        """Keeps the line for the terminal: here, and for a sweep in its folder, which other processes can read too."""
        if settings.mode != RunMode.MULTIRUN:
            self.failures.append(line)
            return
        own = ",".join(override for override in settings.overrides.task if override not in self.arguments)
        self.failures.append(f"job {settings.job.num} ({own}) failed: {line}")
        note_failure(Path(settings.sweep.dir), self.failures[-1])


def main(task: Callable[[DictConfig], None], config_name: str) -> None:
    """Composes ``conf/<config_name>.yaml`` with the command line and runs the task, or one job each with ``-m``.

    A job that raises (out of memory included) leaves ``summary.json`` with ``status: failed`` and a one-line ``error``,
    and ``error.txt`` with the traceback, and the next job runs. After the last one the process prints a line for each
    failure and exits 1. Ctrl-C and SIGTERM end the sweep with exit status 130. ``SPARTON_TRACEBACK=1`` shows
    tracebacks.

    Args:
        task: called with the composed configuration of each job.
        config_name: root configuration below ``conf/``.
    """
    register_resolvers()
    _quieten()
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # ends a run as Ctrl-C does, in every phase of it
        signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    # Hydra then hands its own errors on, instead of printing several lines and leaving.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    jobs = _Jobs(task)
    try:
        arguments = get_args_parser().parse_args()
        if arguments.multirun:
            refuse_torchrun()
        if not (arguments.help or arguments.hydra_help or arguments.config_dir):
            check_overrides(CONF, arguments.config_name or config_name, arguments.overrides)
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(jobs)()
    except KeyboardInterrupt:
        _leave(["interrupted"], INTERRUPTED)
    except Exception as error:  # of Hydra: those of a job never come this far
        if os.environ.get(SHOW_TRACEBACK) == "1":
            traceback.print_exc()
        _leave([_describe(error)], 1)
    failures = jobs.failures + [line for line in failures_elsewhere() if line not in jobs.failures]
    if failures:
        _leave(failures, 1)


def _quieten() -> None:
    """Keeps from the terminal what Lightning says about itself; its warnings about the run stay."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Lightning 2.6 calls what torch 2.13 renamed: nothing that a user could change.
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")


def _leave(lines: list[str], status: int) -> NoReturn:
    sys.stdout.flush()
    for line in lines:
        print(f"error: {line}" if status == 1 else line, file=sys.stderr)
    sys.exit(status)


def _is_interrupt(error: BaseException) -> bool:
    """Whether Ctrl-C is behind it: Lightning turns that into a SystemExit raised while handling KeyboardInterrupt."""
    return isinstance(error, SystemExit) and any(isinstance(e, KeyboardInterrupt) for e in chain(error))


def _describe(error: BaseException) -> str:
    """One line for an error; for Hydra's wrapper around a class that refused its arguments, that class's own message."""
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, SIGTERMException):  # in a launcher's worker, where no signal becomes another
        return "stopped by SIGTERM"
    if isinstance(error, SystemExit):
        return f"the job left with exit status {error.code}"
    # A UnicodeError is a ValueError, but not one of ours.
    speaks = isinstance(error, SPEAKING_ERRORS) and not isinstance(error, UnicodeError)
    return one_line(error) if speaks else f"{type(error).__name__}: {one_line(error)}"


def _record_failure(folder: Path, error: BaseException) -> str:
    """Leaves ``error.txt`` and ``summary.json`` in the job's folder and returns the line for the terminal."""
    line = _describe(error)
    text = "".join(traceback.format_exception(error))
    if os.environ.get(SHOW_TRACEBACK) == "1":
        print(text, file=sys.stderr)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "error.txt").write_text(text, encoding="utf-8")
    except OSError as problem:  # a full disk is one of the errors that are recorded here
        return f"{line} (the traceback could not be written: {one_line(problem)})"
    _write(folder, {"status": "failed", "error": line} | environment())
    return f"{line} (traceback: {folder / 'error.txt'})"


def _write(folder: Path, summary: dict[str, str | None]) -> None:
    """Writes a summary about a job that did not finish; where even that fails, says so."""
    try:
        write_summary(folder, summary)
    except OSError as problem:
        print(f"summary.json could not be written: {one_line(problem)}", file=sys.stderr)


def _clean_up(exit_code: int) -> None:
    """Leaves nothing of a job to the next one: memory, compile caches, peak statistics, signal handler, wandb run."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # Lightning's doing, after an interrupt
        signal.signal(signal.SIGINT, signal.default_int_handler)
    wandb = sys.modules.get("wandb")
    if wandb is not None and getattr(wandb, "run", None) is not None:
        try:
            wandb.finish(exit_code=exit_code)
        except Exception as problem:  # noqa: BLE001 - whatever it is, a job never fails because of wandb
            print(f"wandb: the run could not be finished ({one_line(problem)})", file=sys.stderr)
    gc.collect()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        gc.collect()  # what the compile caches held
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
