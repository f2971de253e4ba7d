"""Sections on what failed, on machine, versions and commands, and the table of all runs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import PurePath
from typing import Any

from reporting.document import Column, Commands, Points, Section, Table
from reporting.runs import UNFINISHED, Run, hide_paths
from reporting.settings import precision
from reporting.speed import MIB_IN_GIB

WORDS = {
    "interrupted": "stopped by Ctrl-C or a signal",
    UNFINISHED: "left no summary: still running, or killed (by the system, for memory or time)",
}
MACHINE = {
    "device": "device", "alloc_conf": "allocator", "python_version": "Python", "torch_version": "torch",
    "triton_version": "triton", "lightning_version": "lightning", "transformers_version": "transformers",
    "commit": "commit",
}  # fmt: skip


def failures_section(runs: Sequence[Run], problems: Sequence[str]) -> Section | None:
    """Every run that did not finish, in plain words, with its error; and folders that could not be read."""
    lost = [run for run in runs if not run.finished]
    section = Section("What failed, and why")
    if lost:
        lines = [
            [run.name, run.head, run.model, None if run.searched else run.batch, _why(run), _error(run), _said(run)]
            for run in lost
        ]
        columns = [
            Column("run", False), Column("head", False), Column("model", False), Column("batch", decimals=0),
            Column("what happened", False), Column("error", False), Column("overrides", False),
        ]  # fmt: skip
        section.blocks.append(Table(f"{len(lost)} of {len(runs)} runs did not finish", columns, lines))
    if problems:
        section.blocks.append(Points([hide_paths(problem) for problem in problems]))
    return section if section.blocks else None


def _why(run: Run) -> str:
    if run.out_of_memory:
        return "ran out of memory: this batch does not fit"
    return WORDS.get(run.status, "failed with an error")


def _error(run: Run) -> str | None:
    error = run.summary.get("error")
    shown = hide_paths(" ".join(str(error).split())) if error else None
    if shown and run.out_of_memory:  # PyTorch's message goes on with the state of the card and advice
        shown = re.sub(r"(Tried to allocate [\d.]+ \w+).*", r"\1", shown)
    return shown if shown is None or len(shown) <= 240 else f"{shown[:240].rsplit(' ', 1)[0]} …"


def _said(run: Run) -> str | None:
    return hide_paths(" ".join(run.overrides)) or None


def machine_section(runs: Sequence[Run]) -> Section | None:
    """Devices, versions, commits and dates, each combination once."""
    found: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        if any(run.summary.get(name) for name in MACHINE):
            found.setdefault(tuple(run.summary.get(name) for name in MACHINE), []).append(run)
    section = Section("Machine, versions and commands")
    if found:
        lines = []
        for values, members in found.items():
            dates = sorted(str(run.summary["date"])[:10] for run in members if run.summary.get("date"))
            days = " to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else None
            shown = [_commit(v) if name == "commit" else v for name, v in zip(MACHINE, values, strict=True)]
            lines.append([*shown, days, len(members)])
        columns = [*(Column(told, False) for told in MACHINE.values()), Column("date", False), Column("runs")]
        section.blocks.append(Table("What the runs ran on", columns, lines))
    if lines := commands(runs):
        section.blocks += ["How to run them again; paths of the machine are left out:", Commands(lines)]
    return section if section.blocks else None


def _commit(value: Any) -> str | None:
    return None if value is None else str(value)[:12] + ("-dirty" if str(value).endswith("-dirty") else "")


def commands(runs: Iterable[Run]) -> list[str]:
    """A command for each sweep, with commas where its runs differ; one for each run where they are no product."""
    sweeps: dict[object, list[list[tuple[str, str]]]] = {}
    for run in runs:
        # What deletes a key (~callbacks.memory) has no value, and no sign before it.
        pairs = [(name + sign, value) for name, sign, value in (line.partition("=") for line in run.overrides)]
        if pairs or run.config:
            place = PurePath(run.name).parent if len(PurePath(run.name).parts) > 1 else PurePath()
            sweeps.setdefault((place, tuple(name for name, _ in pairs)), []).append(pairs)
    lines = []
    for members in sweeps.values():
        values = [list(dict.fromkeys(pair[1] for pair in column)) for column in zip(*members, strict=True)]
        count = 1
        for column in values:
            count *= len(column)
        distinct = {tuple(pairs) for pairs in members}
        if count == len(distinct) and not any("," in value for column in values if len(column) > 1 for value in column):
            names = [name for name, _ in members[0]]
            words = [name + ",".join(column) for name, column in zip(names, values, strict=True)]
            lines.append(shlex.join(["python", "train.py", *(["-m"] if count > 1 else []), *words]))
        else:
            lines += [shlex.join(["python", "train.py", *map("".join, pairs)]) for pairs in sorted(distinct)]
    return [hide_paths(line) for line in dict.fromkeys(lines)]


def all_runs_section(runs: Sequence[Run], timed: Sequence[Run]) -> Section:
    """One row for each run with its most important settings and figures; speed of those in ``timed``."""
    lines, studied = [], {run.name for run in timed}
    for run in runs:
        speed = [
            run.number(name) if run.name in studied else None for name in ("perf/step_ms", "perf/samples_per_sec")
        ]
        memory = run.number("perf/peak_mem_allocated_mib") or run.number("perf/peak_rss_mib")
        lines.append([
            run.name, run.status, run.model, run.head, run.summary.get("packed"), run.dataset,
            run.settings.get("model.config.vocab_size"), run.settings.get("model.max_doc_length"), precision(run),
            run.settings.get("model.gradient_checkpointing"), run.largest or (None if run.searched else run.batch),
            run.settings.get("seed"), run.settings.get("flops_weight"), *speed,
            None if memory is None else memory / MIB_IN_GIB,
            run.number("test/ndcg@10"), run.number("test/active_dims_doc"),
        ])  # fmt: skip
    columns = [
        Column("run", False), Column("status", False), Column("model", False), Column("head", False),
        Column("backbone", False), Column("data", False), Column("vocabulary", decimals=0),
        Column("longest document", decimals=0), Column("precision", False), Column("checkpointing", False),
        Column("batch", decimals=0), Column("seed", decimals=0), Column("FLOPS weight", False), Column("step, ms"),
        Column("samples/s"), Column("peak, GiB"), Column("nDCG@10", decimals=3), Column("dims doc"),
    ]  # fmt: skip
    # What is the same in all runs stands at the top of the page.
    same = [i for i in range(2, len(columns)) if len(runs) > 1 and len({repr(line[i]) for line in lines}) == 1]
    lines = [[cell for i, cell in enumerate(line) if i not in same] for line in lines]
    kept = [column for i, column in enumerate(columns) if i not in same]
    return Section("All runs", [Table("Every run", kept, lines)])
