"""Draws the figures: lines over an axis, bars of the largest batch, parts of a step, losses, quality and languages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from reporting.settings import in_order
from reporting.style import PARTS, WIDTH, legend, line, look, sheet

Point = tuple[float, float]
CLOSE = 0.08  # share of an axis below which two ticks' labels run into each other
NARROW = 1.25  # ratio of largest to smallest below which an axis shows more than it was asked to


@dataclass
class Panel:
    """A panel: what stands above it, points by label, and the places on the axis where a label ran out of memory."""

    title: str
    lines: dict[str, list[Point]]
    failed: dict[str, list[float]] = field(default_factory=dict)
    across: str = ""
    up: str = ""


def lines(panels: Sequence[Panel]) -> Figure:
    """Lines over logarithmic axes; a cross on the upper edge is what ran out of memory."""
    figure, axes = sheet(len(panels))
    every = in_order(label for panel in panels for label in (*panel.lines, *panel.failed))
    for axis, panel in zip(axes, panels, strict=True):
        axis.set(xscale="log", yscale="log", xlabel=panel.across, ylabel=panel.up)
        axis.set_title(panel.title)
        for label in in_order((*panel.lines, *panel.failed)):
            points = sorted(panel.lines.get(label, []))
            axis.plot([x for x, _ in points], [y for _, y in points], **line(label, every))
            if crosses := panel.failed.get(label):
                # Crosses of several heads at one place stand below each other.
                height = 0.97 - 0.065 * in_order(panel.failed).index(label)
                axis.plot(
                    crosses, [height] * len(crosses), "X", color=look(label, every).colour, markersize=8,
                    transform=axis.get_xaxis_transform(), markeredgecolor="white",
                )  # fmt: skip
        xs = {x for points in panel.lines.values() for x, _ in points} | {x for f in panel.failed.values() for x in f}
        axis.margins(x=0.06, y=0.12 if not panel.failed else 0.3)
        _ticks(axis, sorted(xs), [y for points in panel.lines.values() for _, y in points])
    legend(figure, axes)
    return figure


def _ticks(axis: Any, xs: Sequence[float], ys: Sequence[float]) -> None:
    """Ticks at the values that were measured, where they are few and apart; 1, 2 and 5 up the side, or even steps."""
    axis.xaxis.set_minor_locator(NullLocator())
    if len(xs) <= 8:
        apart: list[float] = []
        for x in xs:
            if not apart or math.log(x / apart[-1]) > CLOSE * math.log(xs[-1] / xs[0]):
                apart.append(x)
        axis.set_xticks(apart, [_short(x) for x in apart])
    else:
        axis.xaxis.set_major_locator(LogLocator(base=4 if max(xs) / min(xs) > 100 else 2))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _short(x)))
    near = bool(ys) and max(ys) < 4 * min(ys)
    axis.yaxis.set_major_locator(MaxNLocator(5) if near else LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _short(y)))
    axis.yaxis.set_minor_formatter(NullFormatter())
    if near:
        axis.yaxis.set_minor_locator(NullLocator())
    if near and max(ys) < NARROW * min(ys):  # what is nearly alike shall look so
        middle = math.sqrt(min(ys) * max(ys))
        axis.set_ylim(middle / NARROW, middle * NARROW)


def _short(value: float) -> str:
    return f"{value / 1000:,.3g}k" if value >= 10_000 else f"{value:,.4g}"


def bars(rows: Mapping[str, Mapping[str, float]], notes: Mapping[str, Mapping[str, str]], across: str) -> Figure:
    """Horizontal bars on a logarithmic axis, a block for each group, a bar for each label with its note at the end."""
    count = sum(len(row) for row in rows.values())
    figure = Figure(figsize=(WIDTH, 0.36 * count + 0.42 * len(rows) + 0.9), layout="constrained")
    axis = figure.subplots()
    every = in_order(label for row in rows.values() for label in row)
    place, ticks = 0.0, []
    for title, row in rows.items():
        axis.text(
            0.0, place - 0.75, title, transform=axis.get_yaxis_transform(), fontweight="bold", va="center", fontsize=9.5
        )
        for label in in_order(row):
            seen = look(label, every)
            axis.barh(place, row[label], 0.8, color=seen.colour, hatch=seen.hatch, edgecolor="white", linewidth=0)
            axis.annotate(
                notes[title][label], (row[label], place), (5, 0), textcoords="offset points", va="center", fontsize=9.5
            )
            ticks.append((place, label))
            place += 1
        place += 1.2
    axis.set_yticks([at for at, _ in ticks], [label for _, label in ticks])
    axis.set(xscale="log", xlabel=across)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _short(x)))
    axis.xaxis.set_minor_formatter(NullFormatter())
    smallest = min(value for row in rows.values() for value in row.values())
    largest = max(value for row in rows.values() for value in row.values())
    axis.set_xlim(10 ** math.floor(math.log10(smallest * 0.9)), largest * (largest / smallest) ** 0.12 * 1.6)
    axis.set_ylim(place - 1.5, -1.25)
    axis.grid(False, axis="y")
    axis.tick_params(axis="y", length=0)
    return figure


def parts(rows: Sequence[tuple[str, Mapping[str, float], str]], across: str) -> Figure:
    """Stacked bars of the parts of a step: the bar's name, its parts and a note at its end."""
    figure = Figure(figsize=(WIDTH, 0.42 * len(rows) + 1.2), layout="constrained")
    axis = figure.subplots()
    longest = max(sum(row.values()) for _, row, _ in rows)
    for place, (_, row, note) in enumerate(rows):
        left = 0.0
        for name, seen in PARTS.items():
            width = row.get(name, 0.0)
            axis.barh(
                place, width, 0.72, left=left, color=seen.colour, hatch=seen.hatch, edgecolor="white", linewidth=0.8,
                label=name if place == 0 else None,
            )  # fmt: skip
            left += width
        axis.annotate(note, (left, place), (5, 0), textcoords="offset points", va="center", fontsize=9.5)
    axis.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set(xlabel=across, xlim=(0, longest * 1.16))
    axis.grid(False, axis="y")
    axis.tick_params(axis="y", length=0)
    legend(figure, [axis])
    return figure


@dataclass
class Curves:
    """Losses of one study: a title, and for each label the seeds' losses by step."""

    title: str
    seeds: dict[str, list[Mapping[int, float]]]


def curves(studies: Sequence[Curves]) -> Figure:
    """Losses laid over each other: thin lines are seeds, the thick one is their mean; the first label lies lowest."""
    figure, axes = sheet(len(studies))
    every = in_order(label for study in studies for label in study.seeds)
    for axis, study in zip(axes, studies, strict=True):
        for depth, label in enumerate(in_order(study.seeds)):
            seen, runs = look(label, every), study.seeds[label]
            if len(runs) > 1:
                for run in runs:
                    axis.plot(list(run), list(run.values()), color=seen.colour, linewidth=0.6, alpha=0.45)
            steps = sorted(set.intersection(*(set(run) for run in runs)))
            mean = [fmean(run[step] for run in runs) for step in steps]
            # The first line is broad and pale, so that one that lies on it doesn't hide it.
            axis.plot(
                steps, mean, color=seen.colour, linestyle="-" if depth == 0 else seen.dashes, label=label,
                linewidth=4.0 if depth == 0 else 1.5, alpha=0.55 if depth == 0 else 1.0,
            )  # fmt: skip
        axis.set(xlabel="step", ylabel="training loss")
        axis.set_title(study.title)
    legend(figure, axes)
    return figure


@dataclass
class Scatter:
    """Quality over sparsity: points with a word beside each, by label; BM25's quality where it is known."""

    title: str
    points: dict[str, list[tuple[float, float, str]]]
    across: str
    reference: float | None = None


def scatter(panels: Sequence[Scatter]) -> Figure:
    """nDCG@10 over a logarithmic axis of sparsity."""
    figure, axes = sheet(len(panels), height=3.5)
    every = in_order(label for panel in panels for label in panel.points)
    for axis, panel in zip(axes, panels, strict=True):
        for turn, label in enumerate(in_order(panel.points)):
            points = sorted(panel.points[label])
            joined = len({word for *_, word in points}) == len(points) > 2  # a sweep, not seeds
            style = line(label, every) | ({} if joined else {"linestyle": ""})
            axis.plot([x for x, _, _ in points], [y for _, y, _ in points], **style)
            for x, y, word in points:
                beside = (5, -13) if turn % 2 else (-5, 7)
                side = "left" if turn % 2 else "right"
                axis.annotate(word, (x, y), beside, textcoords="offset points", fontsize=8.5, color="#333333", ha=side)
        if panel.reference is not None:
            axis.axhline(panel.reference, color="black", linewidth=1.2, linestyle=(0, (6, 3)), label="BM25")
        xs = [x for points in panel.points.values() for x, _, _ in points]
        axis.set(xscale="log", xlabel=panel.across, ylabel="nDCG@10")
        if max(xs) < 6 * min(xs):
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8)))
        else:
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_minor_formatter(NullFormatter())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _short(x)))
        axis.margins(x=0.12, y=0.18)
        axis.set_title(panel.title)
    legend(figure, axes)
    return figure


def languages(rows: Sequence[tuple[str, Mapping[str, tuple[float, float]]]]) -> Figure:
    """Mean nDCG@10 of each language with the standard deviation over seeds as a bar, heads beside each other."""
    figure = Figure(figsize=(WIDTH, 0.36 * len(rows) + 1.3), layout="constrained")
    axis = figure.subplots()
    every = in_order(label for _, row in rows for label in row)
    for turn, label in enumerate(every):
        shift = 0.26 * (turn - (len(every) - 1) / 2)
        found = [(place + shift, *row[label]) for place, (_, row) in enumerate(rows) if label in row]
        at, mean, spread = zip(*found, strict=True)
        axis.errorbar(mean, at, xerr=spread, **line(label, every) | {"linestyle": ""}, capsize=3, elinewidth=1.2)
    axis.set_yticks(range(len(rows)), [name for name, _ in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set(xlabel="nDCG@10, mean and standard deviation over seeds")
    legend(figure, [axis])
    return figure
