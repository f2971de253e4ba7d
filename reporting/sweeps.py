"""Sections with lines: memory and throughput against batch size, against the longest document, against the vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from reporting import figures
from reporting.document import Block, Picture, Section, plain
from reporting.figures import Panel
from reporting.runs import Run, number
from reporting.settings import BATCH, FOUND, LENGTH, PACKED, VOCABULARY, Group, differing, groups, in_order, shared, title
from reporting.speed import MIB, RATE, Entry, entries, with_rivals


@dataclass(frozen=True)
class Axis:
    """What runs vary: heading, settings that hold it, its value in a run and its name below the axis."""

    heading: str
    name: str
    free: tuple[str, ...]
    read: Callable[[Run], float | None]
    across: str


AXES = (
    Axis("Against batch size", "batch", BATCH, lambda run: run.batch, "batch"),
    Axis("Against sequence length", "length", LENGTH, lambda run: number(run.settings.get(LENGTH[0])),
         "longest document, tokens"),
    Axis("Against vocabulary", "vocabulary", VOCABULARY, lambda run: number(run.settings.get(VOCABULARY[0])),
         "vocabulary, words"),
)  # fmt: skip


@dataclass(frozen=True)
class Quantity:
    """What is drawn: stem of the file, name, unit on the axis, its value in an entry, and whether more is better."""

    name: str
    told: str
    up: str
    read: Callable[[Entry], float | None]


QUANTITIES = (
    Quantity("memory", "peak memory", "peak allocated, GiB", lambda e: e.mean("perf/peak_mem_allocated_mib", MIB)),
    Quantity("memory", "peak memory of the process", "peak of the process, GiB", lambda e: e.mean("perf/peak_rss_mib", MIB)),
    Quantity("throughput", "throughput", "samples/s", lambda e: e.mean(RATE)),
)


def sections(runs: Sequence[Run], named: Mapping[str, str]) -> list[Section]:
    """A section for each axis along which at least two runs of one head differ."""
    found = []
    for axis in AXES:
        section = Section(axis.heading)
        members = _varied(runs, axis, named)
        for quantity in QUANTITIES:
            section.blocks += _picture(members, axis, quantity, named)
        if axis.name == "batch":
            section.blocks += _tries(runs, named)
        if section.blocks:
            found.append(section)
    return found


def _varied(runs: Sequence[Run], axis: Axis, named: Mapping[str, str]) -> list[Group]:
    """Groups in which some head finished with two values of the axis."""
    known = [run for run in runs if not run.searched and axis.read(run) is not None]
    found = groups(known, (*axis.free, *PACKED))
    return [
        group for group in found
        if any(len({axis.read(run) for run in e.runs if run.number(RATE)}) > 1 for e in entries(group, named).values())
    ]  # fmt: skip


def _picture(found: Sequence[Group], axis: Axis, quantity: Quantity, named: Mapping[str, str]) -> list[Block]:
    titles, told = differing(found) if found else ([], [])
    panels = []
    for group, one in zip(found, told, strict=True):
        lines: dict[str, list[tuple[float, float]]] = {}
        failed: dict[str, list[float]] = {}
        for label in in_order(named[run.name] for run in group.runs):
            own = [run for run in group.runs if named[run.name] == label]
            for x in sorted({axis.read(run) for run in own}):
                here = [run for run in own if axis.read(run) == x]
                y = quantity.read(Entry(label, tuple(run for run in here if run.finished)))
                if y is not None:
                    lines.setdefault(label, []).append((x, y))
                elif any(run.out_of_memory for run in here):
                    failed.setdefault(label, []).append(x)
        if any(len(points) > 1 for points in lines.values()):
            unit = f", {group.runs[0].batch_unit}" if axis.name == "batch" else ""
            panels.append(Panel(title(one, titles), lines, failed, f"{axis.across}{unit}", quantity.up))
    if not panels:
        return []
    cross = " A cross on the upper edge: out of memory." if any(panel.failed for panel in panels) else ""
    told_settings = f" Settings of all: {shared(found)}."
    caption = f"{quantity.told.capitalize()} against {axis.across}.{cross}{told_settings}"
    alt = f"{quantity.told.capitalize()} against {axis.across}. " + " ".join(map(_said, panels))
    return [Picture(f"{quantity.name}_{axis.name}", caption, alt, figures.lines(panels))]


def _tries(runs: Sequence[Run], named: Mapping[str, str]) -> list[Block]:
    """Memory against batch size from what find_batch tried."""
    found = with_rivals(groups([run for run in runs if run.tries], (*FOUND, *PACKED)), named) if runs else []
    titles, told = differing(found) if found else ([], [])
    panels = []
    for group, one in zip(found, told, strict=True):
        lines: dict[str, dict[float, float]] = {}
        for run in group.runs:
            for row in run.tries:
                size, peak = number(row.get("size")), number(row.get("peak_reserved_mib"))
                if size and peak and str(row.get("fits")).lower() in ("true", "1"):
                    lines.setdefault(named[run.name], {})[size] = peak / MIB
        if lines:
            points = {label: list(line.items()) for label, line in lines.items()}
            unit = group.runs[0].batch_unit
            panels.append(Panel(title(one, titles), points, {}, f"batch, {unit}", "peak reserved, GiB"))
    if not panels:
        return []
    caption = f"Peak memory of every batch that find_batch tried and that fit. Settings of all: {shared(found)}."
    alt = "Peak reserved memory against batch size, from find_batch. " + " ".join(map(_said, panels))
    return [Picture("memory_tries", caption, alt, figures.lines(panels))]


def _said(panel: Panel) -> str:
    """A panel in words: where each line begins and ends."""
    parts = []
    for label, points in panel.lines.items():
        (x0, y0), (x1, y1) = min(points), max(points)
        parts.append(f"{label} from {plain(y0)} at {plain(x0)} to {plain(y1)} at {plain(x1)}")
    parts += [f"{label} out of memory at {', '.join(map(plain, xs))}" for label, xs in panel.failed.items()]
    return f"{panel.title + ': ' if panel.title else ''}{'; '.join(parts)}."
