"""Reads the CSVs that bench_head.py writes."""

from __future__ import annotations

import csv
import math
from pathlib import Path

Row = dict[str, str]


def read(paths: list[Path]) -> list[Row]:
    """All rows of the files.

    Raises:
        ValueError: for a file that is missing or isn't one of bench_head.py, in one line.
    """
    rows: list[Row] = []
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path}: no such file; make it with python -m benchmarks.bench_head --out {path}")
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            if not {"case", "impl", "status", "device"} <= set(reader.fieldnames or ()):
                raise ValueError(f"{path}: expected a CSV of bench_head.py, got columns {reader.fieldnames}")
            rows += reader
    return rows


def number(row: Row | None, column: str) -> float:
    """A cell as a number; NaN for a row or a cell that isn't there."""
    text = (row or {}).get(column)
    return float(text) if text else math.nan


def told(rows: list[Row], *columns: str) -> str:
    """What the rows say they were measured on, each once."""
    return ", ".join(" and ".join(dict.fromkeys(row[column] for row in rows)) for column in columns)
