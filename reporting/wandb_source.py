"""Reads the runs of a wandb project as if they lay in folders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reporting.runs import Run, flat, number

STEP, LOSS = "trainer/global_step", "train/loss"
STATES = {"finished": "finished", "failed": "failed", "crashed": "failed", "killed": "interrupted"}
CRASHED = "crashed: wandb heard no more of it; error.txt in the run's folder says why"
SECONDS = 20


def read_project(source: str, api: Any = None) -> list[Run]:
    """Reads every run of ``ENTITY/PROJECT`` or, with ``/GROUP`` after it, of one group.

    The batch finder's tries stay in the runs' folders; wandb has none.

    Args:
        source: the project.
        api: a ``wandb.Api``; one with a timeout of 20 seconds unless given.

    Raises:
        ValueError: in one line, where the source has another form, nothing answers or there is no run.
    """
    parts = source.strip("/").split("/", 2)
    if len(parts) < 2 or not all(parts):
        raise ValueError(f"wandb:{source}: expected wandb:ENTITY/PROJECT or wandb:ENTITY/PROJECT/GROUP")
    filters = {"group": parts[2]} if len(parts) == 3 else {}
    try:
        runs = list((api or _api()).runs("/".join(parts[:2]), filters=filters))
        found = [_read(run) for run in runs]
    except Exception as error:  # noqa: BLE001 - wandb has errors of its own, of its transport and plain ones
        line = " ".join(str(error).split())[:200]
        message = f"wandb:{source}: could not be read ({line}); see that it exists and that a key opens it"
        raise ValueError(message) from error
    if not found:
        raise ValueError(f"wandb:{source}: expected runs of train.py, found none; see the project's page")
    return found


def _api() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ValueError("wandb is not installed: pip install wandb, or name the folders of the runs") from error
    from lightning_modules.wandb import has_key

    if not has_key():  # wandb would ask for one
        raise ValueError("no key: set WANDB_API_KEY, or run wandb login")
    return wandb.Api(timeout=SECONDS)


def _read(run: Any) -> Run:
    config = dict(flat({name: value for name, value in dict(run.config).items() if not name.startswith("_")}))
    summary = {name: value for name, value in dict(run.summary).items() if isinstance(value, (str, int, float, bool))}
    status = STATES.get(run.state)
    known = {"status": status, "date": getattr(run, "created_at", None)} | _machine(run.metadata or {}) | summary
    if run.state == "crashed":
        known.setdefault("error", CRASHED)
    rows = run.scan_history(keys=[STEP, LOSS])
    losses = {int(row[STEP]): loss for row in rows if (loss := number(row.get(LOSS))) is not None}
    return Run(run.name, None, config, config, known, losses=losses)


def _machine(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Device, Python and commit by the names that ``summary.json`` has for them."""
    return {
        "device": metadata.get("gpu") or "cpu",
        "python_version": str(metadata.get("python") or "").removeprefix("CPython ") or None,
        "commit": (metadata.get("git") or {}).get("commit"),
    }
