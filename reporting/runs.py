"""Reads what runs of train.py left in their folders: settings, overrides, summary, losses, find_batch's tries."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

LOCAL = ("model.name_or_path=", "ckpt_path=", "data.path=", "hydra.", "paths.")
FREE = ("head.", "seed.", "paths.", "logger.", "ckpt_path.")  # in which runs of one study may differ
OUTPUTS = ("output_dir", "dirpath", "default_root_dir")
YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, which is ten times faster, where it was built
UNFINISHED = "unfinished"  # the status of a run that left no summary


@dataclass(frozen=True)
class Run:
    """One run, finished or not.

    ``config`` is the flat configuration as it was written, ``settings`` the same with every interpolation resolved that
    can be; ``losses`` maps steps to training losses, ``tries`` has a row for each batch that find_batch tried.
    """

    name: str
    folder: Path | None
    config: Mapping[str, Any]
    settings: Mapping[str, Any]
    summary: Mapping[str, Any]
    overrides: tuple[str, ...] = ()
    losses: Mapping[int, float] = field(default_factory=dict)
    tries: tuple[Mapping[str, Any], ...] = ()

    @property
    def status(self) -> str:
        """``finished``, ``failed``, ``interrupted`` or ``unfinished``."""
        return str(self.summary.get("status") or UNFINISHED)

    @property
    def finished(self) -> bool:
        """Whether its figures are those of a whole run."""
        return self.status == "finished"

    @property
    def out_of_memory(self) -> bool:
        """Whether memory is what it failed for."""
        error = str(self.summary.get("error") or "").lower()
        return self.status == "failed" and ("outofmemory" in error or "out of memory" in error)

    @property
    def head(self) -> str:
        """The head that ran, or the one that was asked for."""
        return str(self.summary.get("head") or self.settings.get("head.name") or "unknown")

    @property
    def seed(self) -> int | None:
        """The seed of everything random."""
        seed = self.settings.get("seed")
        return None if seed is None else int(seed)

    @property
    def model(self) -> str:
        """The model's name, without the folder or the hub's user before it."""
        return Path(str(self.settings.get("model.name_or_path") or "unknown")).name

    @property
    def dataset(self) -> str:
        """The names of the collections; for synthetic texts the table that their lengths are from."""
        paths = self.settings.get("data.path")
        if paths:
            return "+".join(Path(path).name for path in ([paths] if isinstance(paths, str) else paths))
        target = str(self.settings.get("data._target_") or "unknown").rpartition(".")[2]
        lengths = self.settings.get("data.lengths")
        synthetic = "synthetic" + (f", lengths of {Path(str(lengths)).stem}" if lengths else "")
        return synthetic if target == "SyntheticDataModule" else target

    @property
    def synthetic(self) -> bool:
        """Whether its texts are random, so that only memory and speed mean something."""
        return self.dataset.startswith("synthetic")

    @property
    def searched(self) -> bool:
        """Whether its batch is the largest one that find_batch found."""
        asked = self.settings.get("find_batch") or self.settings.get("find_batch.enabled")
        return bool(asked) or self.largest is not None

    @property
    def largest(self) -> float | None:
        """The largest batch that fits, in queries or, with a budget of tokens, in tokens."""
        return self.number("find_batch/size") or self.number("find_batch/tokens")

    @property
    def batch(self) -> float | None:
        """The batch it trained with: as found, or as asked for."""
        asked = self.settings.get("batch.tokens") or self.settings.get("batch.size")
        return self.largest or (None if asked is None else float(asked))

    @property
    def batch_unit(self) -> str:
        """What a batch is counted in."""
        return "tokens" if self.settings.get("batch.tokens") or self.number("find_batch/tokens") else "queries"

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What runs that are compared have in common: all settings but head, seed and places on disk."""
        seed = self.settings.get("seed")
        return {
            name: value
            for name, value in self.config.items()
            if not f"{name}.".startswith(FREE)
            and not name.endswith(OUTPUTS)
            and not (name.endswith(".seed") and self.settings.get(name) == seed)
        }

    def number(self, name: str) -> float | None:
        """A figure of the summary; None where it is missing, empty or not finite."""
        return number(self.summary.get(name))


def number(value: Any) -> float | None:
    """Returns a finite float, or None for whatever is none."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None


def read_runs(folders: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """Reads every run below ``folders``.

    Returns:
        The runs by name, and a line for each that could not be read.

    Raises:
        OSError: for a folder that is not there.
        ValueError: if there is no run at all.
    """
    folders = list(folders)
    runs: dict[Path, Run] = {}
    problems: list[str] = []
    for folder in folders:
        if not folder.is_dir():
            raise OSError(f"FOLDER: expected a folder of runs of train.py, got {folder}, which is none; see outputs/")
        for place in run_folders(folder):
            name = str(place.relative_to(folder) if place != folder else place.name)
            name = name if len(folders) == 1 else f"{folder.name}/{name}"
            try:
                runs.setdefault(place.resolve(), read_run(place, name))
            except (OSError, ValueError) as problem:
                problems.append(f"{name}: skipped, {problem}")
    if not runs:
        told = f" ({'; '.join(problems)})" if problems else ""
        where = " ".join(map(str, folders))
        raise ValueError(f"FOLDER: expected runs of train.py, found none that can be read below {where}{told}")
    return sorted(runs.values(), key=lambda run: _natural(run.name)), problems


def run_folders(folder: Path) -> list[Path]:
    """The folders of runs below ``folder``: those with a summary, or with a configuration and none."""
    found = {path.parent for path in folder.rglob("summary.json")}
    found |= {path.parent.parent for path in folder.rglob(".hydra/config.yaml")}
    return sorted(found)


def read_run(folder: Path, name: str) -> Run:
    """Reads one run.

    Raises:
        ValueError: in one line, for a file that can't be read.
    """
    summary = read_summary(folder / "summary.json")
    config, settings = read_config(folder / ".hydra" / "config.yaml")
    return Run(
        name, folder, config, settings, summary, read_overrides(folder),
        read_losses(folder / "metrics.csv"), tuple(_rows(folder / "find_batch.csv")),
    )  # fmt: skip


def read_summary(path: Path) -> dict[str, Any]:
    """The flat summary; empty where there is no file.

    Raises:
        ValueError: for a file that is no JSON object.
    """
    if not path.exists():
        return {}
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name}: expected JSON, got {error}; run it again") from error
    if not isinstance(summary, dict):
        raise ValueError(f"{path.name}: expected a JSON object, got {type(summary).__name__}; run it again")
    return summary


def read_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The flat configuration as it was written, and with what can be resolved without Hydra; empty without a file.

    Raises:
        ValueError: for a file that is no YAML mapping.
    """
    if not path.exists():
        return {}, {}
    node = _yaml(path)
    if not isinstance(node, dict):
        raise ValueError(f"{path.name}: expected a YAML mapping, got {type(node).__name__}; run it again")
    written, cfg = dict(flat(node)), OmegaConf.create(node)
    return written, {name: _resolved(cfg, name, value) for name, value in written.items()}


def flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of a nested mapping; an empty one is a value."""
    for name, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def read_overrides(folder: Path) -> tuple[str, ...]:
    """The run's overrides; a local path says nothing to a reader and is left out."""
    path = folder / ".hydra" / "overrides.yaml"
    said = (_yaml(path) or []) if path.exists() else []
    return tuple(str(line) for line in said if not str(line).startswith(LOCAL))


def read_losses(path: Path) -> dict[int, float]:
    """Step to training loss, NaN and infinities included, from ``metrics.csv``; empty where there are none.

    A row that was cut off, by a full disk or a killed process, is left out.
    """
    cells = ((row.get("step"), row.get("train/loss")) for row in _rows(path))
    return {int(step): float(loss) for step, loss in cells if step and loss}


def hide_paths(text: str) -> str:
    """Shortens absolute paths to their last part: where a run lay says nothing to a reader."""
    return re.sub(r"(?<![\w.:/…])/(?:[^\s/:;,'\"()]+/)+([^\s/:;,'\"()]*)", r"…/\1", text)


def unique(runs: Iterable[Run]) -> list[Run]:
    """The runs with names that tell them apart, also where two sources use the same ones."""
    seen: dict[str, int] = {}
    named = []
    for run in runs:
        seen[run.name] = seen.get(run.name, 0) + 1
        named.append(run if seen[run.name] == 1 else replace(run, name=f"{run.name} #{seen[run.name]}"))
    return named


def _yaml(path: Path) -> Any:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=YAML)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = " ".join(str(error).split())
        raise ValueError(f"{path.name}: expected YAML, got {line[:200]}; run it again") from error


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _resolved(cfg: Any, name: str, value: Any) -> Any:
    if not (isinstance(value, str) and "${" in value):
        return value
    try:
        found = OmegaConf.select(cfg, name)
    except OmegaConfBaseException:  # a resolver or a key that only a running job has
        return value
    return OmegaConf.to_container(found) if OmegaConf.is_config(found) else found


def _natural(name: str) -> list[tuple[str, int]]:
    """Job 10 of a sweep comes after job 9."""
    return [(text, int(part or 0)) for text, part in re.findall(r"(\D*)(\d*)", name)]
