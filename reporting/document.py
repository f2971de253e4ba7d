"""What a report is made of, before anyone decides how it looks: sections of tables, figures, lists and commands."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

SIGNIFICANT = 3


@dataclass(frozen=True)
class Column:
    """A column: numbers stand right with as many decimals each; ``suffix`` follows a number, such as a ratio's ×."""

    title: str
    numeric: bool = True
    decimals: int | None = None
    suffix: str = ""
    signed: bool = False


@dataclass
class Table:
    """Rows of values below a caption; a new group of rows begins at each index in ``starts``."""

    caption: str
    columns: list[Column]
    rows: list[list[Any]]
    starts: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        """Leaves out columns in which no row has anything."""
        kept = [i for i in range(len(self.columns)) if any(row[i] is not None for row in self.rows)]
        self.columns = [self.columns[i] for i in kept]
        self.rows = [[row[i] for i in kept] for row in self.rows]

    def cells(self) -> list[list[str]]:
        """The rows as text; a dash where there is nothing."""
        columns = [
            _formatted([row[i] for row in self.rows], column) for i, column in enumerate(self.columns)
        ]  # fmt: skip
        return [list(row) for row in zip(*columns, strict=True)]


@dataclass
class Picture:
    """A drawn figure: the stem of its file, what a reader sees below it and what it says to those who don't see it."""

    name: str
    caption: str
    alt: str
    drawing: Drawing


@dataclass(frozen=True)
class Points:
    """A list of sentences."""

    lines: list[str]


@dataclass(frozen=True)
class Settings:
    """Under which settings the figures beside it were measured: of all, and of each group by its name."""

    common: dict[str, Any]
    each: list[tuple[str, dict[str, Any]]]
    note: str = ""

    def lines(self) -> list[str]:
        """A sentence for what all have in common, then one for each group."""
        common = f"Settings: {listed(self.common)}." if self.common else ""
        each = (f"{name}: {listed(one)}." for name, one in self.each if one)
        return [line for line in (common, *each, self.note) if line]


@dataclass(frozen=True)
class Commands:
    """Lines for a shell."""

    lines: list[str]


Block = str | Table | Picture | Points | Settings | Commands


@dataclass
class Section:
    """A heading and what stands below it."""

    title: str
    blocks: list[Block] = field(default_factory=list)


@dataclass
class Report:
    """The whole page: what was found at the top, then the sections that there are figures for."""

    title: str
    about: str
    findings: list[str]
    settings: str
    sections: list[Section]


def _formatted(column: Sequence[Any], how: Column) -> list[str]:
    numbers = [abs(value) for value in column if _is_number(value) and value]
    decimals = how.decimals
    if decimals is None:
        size = math.floor(math.log10(median(numbers))) if numbers else 0
        whole = all(float(value).is_integer() for value in numbers) and not how.suffix
        decimals = 0 if whole else min(max(SIGNIFICANT - 1 - size, 0), 3)
    return [_cell(value, how, decimals) for value in column]


def _cell(value: Any, how: Column, decimals: int) -> str:
    if value is None:
        return "–"
    if not how.numeric or not _is_number(value):
        return text(value)
    shown = f"{value:+,.{decimals}f}" if how.signed else f"{value:,.{decimals}f}"
    if value and abs(value) < 0.5 * 10**-decimals:  # a small number is not nothing
        shown = f"{value:.2g}"
    return shown.replace("-", "−") + how.suffix


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def text(value: Any) -> str:
    """A setting for a reader: numbers with separators of thousands, truth as yes and no."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def listed(values: dict[str, Any]) -> str:
    """Settings in a line: ``precision bf16-mixed; longest document 512``."""
    return "; ".join(f"{name} {text(value)}" for name, value in values.items())


def ratio(value: float) -> str:
    """A ratio in a sentence: 8.1×, 41.0×."""
    return f"{value:.2g}×" if value < 1 else f"{value:,.1f}×"


def plain(value: float) -> str:
    """A number in a sentence, with three digits that count."""
    return f"{value:,.0f}" if abs(value) >= 100 or float(value).is_integer() else f"{value:.3g}"
