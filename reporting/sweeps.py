"""Sections with lines: memory and throughput against batch size, longest document and vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from reporting import figures
from reporting.document import Block, Picture, Section, plain
from reporting.figures import Panel
from reporting.runs import Run, number
from reporting.settings import BATCH, FOUND, LENGTH, PACKED, VOCABULARY, Group, groups, in_order, names, stated
from reporting.speed import MIB_IN_GIB, RATE, Entry, entries, with_rivals


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
    """What is drawn: name on the axis, and its value in an entry."""

    up: str
    read: Callable[[Entry], float | None]


# Not the process's memory on the CPU: what earlier runs of a sweep took counts there.
QUANTITIES = (
    Quantity("peak allocated, GiB", lambda e: e.mean("perf/peak_mem_allocated_mib", MIB_IN_GIB)),
    Quantity("samples/s", lambda e: e.mean(RATE)),
)


def sections(runs: Sequence[Run], named: Mapping[str, str]) -> list[Section]:
    """A section for each axis along which at least two runs of one head differ."""
    found = []
    for axis in AXES:
        section = Section(axis.heading)
        members = _varied(runs, axis, named)
        section.blocks += _picture(members, axis, named)
        if axis.name == "batch":
            section.blocks += _tries(runs, named)
        if section.blocks:
            of = members or _tried(runs, named)
            section.blocks.insert(0, stated(of))
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


def _picture(found: Sequence[Group], axis: Axis, named: Mapping[str, str]) -> list[Block]:
    """Memory and throughput of each group beside each other."""
    panels = []
    for group, where in zip(found, names(found) if found else [], strict=True):
        unit = f", {group.runs[0].batch_unit}" if axis.name == "batch" else ""
        for quantity in QUANTITIES:
            lines, failed = _lines(group, axis, quantity, named)
            if lines:
                panels.append(Panel(where, lines, failed, f"{axis.across}{unit}", quantity.up))
    if not panels:
        return []
    cross = " A cross at the upper edge: out of memory." if any(panel.failed for panel in panels) else ""
    caption = f"{' and '.join(dict.fromkeys(panel.up for panel in panels))} against {axis.across}.{cross}"
    caption = caption[0].upper() + caption[1:]
    alt = f"Lines against {axis.across}. " + " ".join(map(_said, panels))
    return [Picture(axis.name, caption, alt, figures.lines(panels))]


def _lines(
    group: Group, axis: Axis, quantity: Quantity, named: Mapping[str, str]
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, list[float]]]:
    """Points by label, and where a label ran out of memory."""
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
    return lines, failed


def _tried(runs: Sequence[Run], named: Mapping[str, str]) -> list[Group]:
    known = [run for run in runs if run.tries]
    return with_rivals(groups(known, (*FOUND, *PACKED)), named) if known else []


def _tries(runs: Sequence[Run], named: Mapping[str, str]) -> list[Block]:
    """Memory against batch size from what find_batch tried."""
    found = _tried(runs, named)
    panels = []
    for group, where in zip(found, names(found) if found else [], strict=True):
        lines: dict[str, dict[float, float]] = {}
        for run in group.runs:
            for row in run.tries:
                size, peak = number(row.get("size") or row.get("tokens")), number(row.get("peak_reserved_mib"))
                if size and peak and str(row.get("fits")).lower() in ("true", "1"):
                    lines.setdefault(named[run.name], {})[size] = peak / MIB_IN_GIB
        if lines:
            points = {label: list(line.items()) for label, line in lines.items()}
            unit = group.runs[0].batch_unit
            panels.append(Panel(where, points, {}, f"batch, {unit}", "peak reserved, GiB"))
    if not panels:
        return []
    caption = "Peak memory of every batch that find_batch tried and that fit."
    alt = "Peak reserved memory against batch size, from find_batch. " + " ".join(map(_said, panels))
    return [Picture("tries", caption, alt, figures.lines(panels))]


def _said(panel: Panel) -> str:
    """A panel in words: where each line begins and ends."""
    parts = []
    for label, points in panel.lines.items():
        (x0, y0), (x1, y1) = min(points), max(points)
        parts.append(f"{label} from {plain(y0)} at {plain(x0)} to {plain(y1)} at {plain(x1)}")
    parts += [f"{label} out of memory at {', '.join(map(plain, xs))}" for label, xs in panel.failed.items()]
    return f"{panel.title + ', ' if panel.title else ''}{panel.up}: {'; '.join(parts)}."
