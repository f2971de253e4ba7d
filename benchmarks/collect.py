"""Runs to one CSV: a line for each summary.json below the folders given.  python benchmarks/collect.py OUT.csv FOLDER..."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

from omegaconf import OmegaConf

LOCAL = ("model.name_or_path=", "ckpt_path=", "data.path=", "hydra.", "paths.")


def collect(folders: list[Path]) -> list[dict[str, object]]:
    """Reads every ``summary.json`` below ``folders``; the run's overrides come from ``.hydra/overrides.yaml``."""
    rows = []
    for path in sorted(p for folder in folders for p in folder.rglob("summary.json")):
        overrides = path.parent / ".hydra" / "overrides.yaml"
        said = OmegaConf.load(overrides) if overrides.exists() else []
        # A local path says nothing to a reader.
        shown = [line for line in said if not line.startswith(LOCAL)]
        summary = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("best_checkpoint", "error")}
        rows.append({"overrides": " ".join(shown)} | summary)
    return rows


def main() -> None:
    """Writes the union of all columns, in the order in which they were first seen."""
    if len(sys.argv) < 3:
        sys.exit("usage: python benchmarks/collect.py OUT.csv FOLDER...")
    rows = collect([Path(folder) for folder in sys.argv[2:]])
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
