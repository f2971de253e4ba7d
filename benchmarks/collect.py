"""Runs to one CSV: a line for each summary.json below the folders.  python -m benchmarks.collect OUT.csv FOLDER..."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from reporting.runs import read_overrides, read_summary


def collect(folders: list[Path]) -> list[dict[str, object]]:
    """A row for each ``summary.json`` below ``folders``, after the run's overrides.

    Raises:
        ValueError: for a summary that can't be read.
    """
    rows = []
    for path in sorted(p for folder in folders for p in folder.rglob("summary.json")):
        summary = {k: v for k, v in read_summary(path).items() if k not in ("best_checkpoint", "error")}
        rows.append({"overrides": " ".join(read_overrides(path.parent))} | summary)
    return rows


def main() -> None:
    """Writes the union of all columns, in the order in which they were first seen."""
    if len(sys.argv) < 3:
        sys.exit("usage: python -m benchmarks.collect OUT.csv FOLDER...")
    try:
        rows = collect([Path(folder) for folder in sys.argv[2:]])
    except ValueError as error:
        sys.exit(str(error))
    if not rows:
        sys.exit(f"no summary.json below {' '.join(sys.argv[2:])}: name the output folder of a finished run")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with open(sys.argv[1], "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    print(f"{len(rows)} runs, {len(columns)} columns: {sys.argv[1]}")


if __name__ == "__main__":
    main()
