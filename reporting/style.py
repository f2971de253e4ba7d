"""How heads look in every figure: one colour, marker, dash and hatch each, told apart without colours too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise SystemExit(f"report.py needs matplotlib ({error}): pip install -c constraints.txt -e '.[report]'") from error

# Pixels of a page for an inch of a figure; files have twice as many, for sharp screens and paper.
PAGE_DPI = 100
FILE_DPI = 2 * PAGE_DPI
WIDTH = 9.6  # inches: the page's column
STYLE = {
    "font.size": 10, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.labelsize": 10, "legend.fontsize": 10,
    "axes.grid": True, "grid.color": "#d9d9d9", "grid.linewidth": 0.6, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#555555", "lines.markersize": 6.5,
    "lines.linewidth": 1.8, "legend.frameon": False, "savefig.dpi": FILE_DPI, "hatch.linewidth": 0.7,
    "axes.titlelocation": "left", "xtick.color": "#333333", "ytick.color": "#333333", "hatch.color": "white",
}  # fmt: skip


@dataclass(frozen=True)
class Look:
    """Of Okabe and Ito's colours, which the colour-blind tell apart, and what does so in black and white."""

    colour: str
    marker: str
    dashes: Any
    hatch: str


LOOKS = {
    "naive": Look("#D55E00", "o", "--", "///"),
    "compiled": Look("#CC79A7", "s", "-.", "..."),
    "tiled": Look("#009E73", "^", ":", "xxx"),
    "sparton": Look("#0072B2", "D", "-", ""),
}
OTHERS = (
    Look("#E69F00", "v", (0, (5, 1, 1, 1, 1, 1)), "\\\\\\"), Look("#56B4E9", "P", (0, (3, 1, 1, 1)), "+++"),
    Look("#000000", "X", (0, (1, 2)), "ooo"),
)  # fmt: skip
# The parts of a step, in the order in which it passes them; the head is the one with the strongest colour.
PARTS = {
    "backbone": Look("#56B4E9", "", "", ""), "head": Look("#D55E00", "", "", "///"),
    "loss": Look("#F0E442", "", "", "..."), "optimizer": Look("#009E73", "", "", "xxx"),
    "other": Look("#999999", "", "", "\\\\\\"),
}  # fmt: skip


def look(label: str, labels: Sequence[str]) -> Look:
    """The look of a label: its head's, whatever else is drawn; other names take turns."""
    head = label.split(" ")[0]
    if head in LOOKS:
        return LOOKS[head]
    strangers = list(dict.fromkeys(name.split(" ")[0] for name in labels if name.split(" ")[0] not in LOOKS))
    return OTHERS[strangers.index(head) % len(OTHERS)]


def line(label: str, labels: Sequence[str]) -> dict[str, Any]:
    """Arguments of a line; hollow markers where the backbone is padded and that is part of the label."""
    seen = look(label, labels)
    face = "white" if "(padded)" in label else seen.colour
    return {
        "color": seen.colour, "marker": seen.marker, "linestyle": seen.dashes, "label": label,
        "markerfacecolor": face, "markeredgewidth": 1.5,
    }  # fmt: skip


def sheet(panels: int, *, columns: int = 2, height: float = 3.1) -> tuple[Figure, list[Any]]:
    """A figure with so many panels, and the panels; one alone doesn't fill the width."""
    columns = min(columns, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(WIDTH if columns > 1 else 6.6, height * rows + 0.4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08, hspace=0.06, wspace=0.05)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in axes[panels:]:
        spare.remove()
    return figure, axes[:panels]


def legend(figure: Figure, axes: Sequence[Any]) -> None:
    """One legend for all panels, below them, so that it covers nothing."""
    found: dict[str, Any] = {}
    for panel in axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if found:
        where = {"loc": "outside lower center", "ncols": min(len(found), 5)}
        figure.legend(found.values(), found.keys(), handlelength=3, **where)
