"""``summary.json``: the flat result of a run, there for failed and interrupted runs too."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning import Trainer


def write_summary(output_dir: str | Path, summary: Mapping[str, Any]) -> Path:
    """Writes ``summary.json`` in one step, so that a reader finds the old file or the whole new one.

    Args:
        output_dir: the run's folder; created where it is missing.
        summary: name to str, bool, int, float or None; tensors of one element become numbers, NaN and infinities null.

    Raises:
        TypeError: for any other value: the file is flat.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    plain = {name: _plain(name, value) for name, value in summary.items()}
    path, partial = folder / "summary.json", folder / "summary.json.partial"
    try:
        partial.write_text(json.dumps(plain, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def training_figures(trainer: Trainer) -> dict[str, Any]:
    """What a finished fit leaves: the last validation, the callbacks' own summaries, the number of processes."""
    figures = {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("val_pool/")}
    for callback in trainer.callbacks:
        figures |= callback.summary() if hasattr(callback, "summary") else {}
    return figures | {"world_size": trainer.world_size}


def _plain(name: str, value: Any) -> str | bool | int | float | None:
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, bool, int)):
        return value
    raise TypeError(f"summary: {name} must be a number, a text or None, got {type(value).__name__}; give it flat")
