"""The runs of a sweep to tables, figures and one page: `python report.py outputs/multirun/DATE/TIME`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from reporting.runs import Run, read_runs, unique

WANDB = "wandb:"


def read(sources: Sequence[str]) -> tuple[list[Run], list[str]]:
    """The runs of all sources, and a line for each that could not be read."""
    folders = [Path(source) for source in sources if not source.startswith(WANDB)]
    runs, problems = read_runs(folders) if folders else ([], [])
    for source in sources:
        if source.startswith(WANDB):
            from reporting.wandb_source import read_project  # an import of seconds, needed for this source only

            runs += read_project(source.removeprefix(WANDB))
    return unique(runs), problems


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the report and prints where it lies; returns 0."""
    parser = argparse.ArgumentParser(prog="report.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "sources", nargs="+", metavar="FOLDER", help="outputs of train.py, or wandb:ENTITY/PROJECT[/GROUP]"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the report goes; the first folder unless told")
    options = parser.parse_args(arguments)
    folders = [source for source in options.sources if not source.startswith(WANDB)]
    if options.out is None and not folders:
        parser.error("--out: expected a folder for the report, got none and no folder of runs; add --out DIR")
    try:
        from reporting.pages import write_pages  # says which extra is missing

        runs, problems = read(options.sources)
        for problem in problems:
            print(problem, file=sys.stderr)
        pages = write_pages(runs, problems, options.out or Path(folders[0]))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    print(f"{len(runs)} runs, {sum(run.finished for run in runs)} finished")
    for page in pages:
        print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
