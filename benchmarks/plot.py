"""Figures of bench_head.py's CSVs: time and memory against B, S, V; a roofline.  python -m benchmarks.plot --help"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.bench_head import OUT_OF_MEMORY
from benchmarks.cases import SWEEP_BASE
from benchmarks.table import Row, number, read, told

try:
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator
except ImportError as error:
    raise SystemExit(f"the figures need matplotlib ({error}): pip install -c constraints.txt -e '.[report]'") from error

# Okabe and Ito's colours, which the colour-blind tell apart; markers and dashes do it in black and white.
LOOKS = {
    "naive": ("#D55E00", "o", "--"),
    "naive_max_first": ("#E69F00", "v", ":"),
    "compiled": ("#CC79A7", "s", "-."),
    "tiled": ("#009E73", "^", ":"),
    "sparton": ("#0072B2", "D", "-"),
    "sparton_padded": ("#56B4E9", "P", "-"),
    "matmul": ("#000000", "X", "-"),
}
AXES = {  # an axis of the sweep: its column in the CSV and its label
    "batch": ("batch", "B, texts"),
    "longest": ("seqlen", "S, tokens of the longest text"),
    "vocab": ("vocab_size", "V, words"),
}
STYLE = {"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "lines.markersize": 5, "savefig.dpi": 200}


def sweep_figure(rows: list[Row]) -> Figure:
    """Time and peak memory of a step, one column of panels for each axis of the sweep."""
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    panels = figure.subplots(2, 3, sharey="row")
    for axis, (top, bottom) in zip(AXES, panels.T, strict=True):
        column, label = AXES[axis]
        others = {AXES[other][0]: value for other, value in SWEEP_BASE.items() if other != axis}
        line = [row for row in rows if all(int(row[name]) == value for name, value in others.items())]
        fixed = ", ".join(f"{AXES[other][1][0]} = {SWEEP_BASE[other]:,}" for other in SWEEP_BASE if other != axis)
        top.set_title(fixed, fontsize=9)
        for panel, quantity in ((top, "step_ms"), (bottom, "peak_memory_mib")):
            _lines(panel, line, column, quantity)
        bottom.set_xlabel(label)
    panels[0, 0].set_ylabel("forward + backward, ms")
    panels[1, 0].set_ylabel("peak memory beyond inputs, MiB")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    where = f"{told(rows, 'device')}, {told(rows, 'dtype')}"
    figure.suptitle(f"{where}; a cross on the upper edge: out of memory", fontsize=9)
    return figure


def _lines(panel: Axes, rows: list[Row], column: str, quantity: str) -> None:
    """A line for each implementation; what ran out of memory is a cross at the panel's upper edge."""
    panel.set(xscale="log", yscale="log")
    for impl, (colour, marker, dashes) in LOOKS.items():
        own = sorted((row for row in rows if row["impl"] == impl), key=lambda row: int(row[column]))
        if not own:
            continue
        panel.plot(
            [int(row[column]) for row in own], [number(row, quantity) for row in own],
            color=colour, marker=marker, linestyle=dashes, label=impl,
        )  # fmt: skip
        failed = [int(row[column]) for row in own if row["status"] == OUT_OF_MEMORY]
        edge = panel.get_xaxis_transform()
        panel.plot(failed, [0.97] * len(failed), "x", color=colour, transform=edge, markeredgewidth=2)
    ticks = sorted({int(row[column]) for row in rows})
    panel.set_xticks(ticks, [f"{tick:,}" if tick < 10_000 else f"{tick / 1000:.0f}k" for tick in ticks], fontsize=8)
    panel.minorticks_off()
    panel.margins(y=0.15)


def roofline_figure(rows: list[Row]) -> Figure:
    """Rate of the forward pass against its arithmetic intensity, under the ceilings measured around the rows."""
    figure = Figure(figsize=(6.5, 5.4), layout="constrained")
    panel = figure.subplots()
    peak = _ceiling(rows, "ceiling_before_tflops_per_s", "ceiling_after_tflops_per_s")
    copy = _ceiling(rows, "copy_before_tb_per_s", "copy_after_tb_per_s")
    intensity = [number(row, "forward_flops") / number(row, "forward_bytes") for row in rows]
    x = np.geomspace(min(intensity) / 2, max(intensity) * 2, 200)
    if not math.isnan(peak):
        roof = f"roof: copy {copy:.2f} TB/s, bf16 product {peak:.0f} TFLOP/s"
        panel.plot(x, np.minimum(peak, copy * x), color="black", linewidth=1, label=roof)
    for impl, (colour, marker, _) in LOOKS.items():
        points = [
            (i, number(row, "forward_tflops_per_s")) for i, row in zip(intensity, rows, strict=True)
            if row["impl"] == impl
        ]  # fmt: skip
        if points:
            panel.plot([p[0] for p in points], [p[1] for p in points], marker, color=colour, label=impl)
    names = {row["case"].removeprefix("forward/"): i for row, i in zip(rows, intensity, strict=True)}
    for place, (name, i) in enumerate(sorted(names.items(), key=lambda item: item[1])):
        # Shapes lie close together: their names, above the panel, take turns in height.
        panel.axvline(i, color="0.85", linewidth=0.8, zorder=0)
        panel.text(
            i, 1.01 + 0.25 * (place % 2), name, fontsize=6, rotation=90, ha="center", va="bottom",
            transform=panel.get_xaxis_transform(),
        )  # fmt: skip
    panel.set(xscale="log", yscale="log")
    panel.set(xlabel="FLOP per byte that must move", ylabel="forward, TFLOP/s on real tokens")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter("")
    figure.legend(fontsize=8, loc="outside lower center", ncols=3)
    figure.suptitle(f"{told(rows, 'device')}, {told(rows, 'dtype')}", fontsize=9)
    return figure


def _ceiling(rows: list[Row], *columns: str) -> float:
    values = [number(row, column) for row in rows for column in columns]
    return median([value for value in values if not math.isnan(value)] or [math.nan])


def main(argv: list[str] | None = None) -> int:
    """Writes the figures that the rows allow."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("csv", type=Path, nargs="+", help="what bench_head.py wrote, with --sweep and without")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="gets sweep.png and roofline.png")
    arguments = parser.parse_args(argv)
    try:
        rows = read(arguments.csv)
    except ValueError as error:
        parser.error(str(error))
    figures = {"sweep": (sweep_figure, "sweep/"), "roofline": (roofline_figure, "forward/")}
    parts = {name: [row for row in rows if row["case"].startswith(part)] for name, (_, part) in figures.items()}
    if not any(parts.values()):
        parser.error("no row of a case sweep/... or forward/...: run bench_head.py with --sweep or --cases forward")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, own in parts.items():
        if own:
            path = arguments.out / f"{name}.png"
            with rc_context(STYLE):
                figures[name][0](own).savefig(path)
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
