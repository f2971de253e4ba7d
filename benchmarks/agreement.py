"""Do the heads agree? Quality over seeds and losses step by step.  python -m benchmarks.agreement FOLDER... --quality Q.csv

Runs that differ in nothing but head and seed are compared with the naive head: its mean nDCG@10 with theirs, of all test
queries and of each language, and its losses with theirs, seed by seed.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from reporting.runs import Run, read_run
from reporting.seeds import compare, deviation

BASELINE = "naive"
MEASURES = ("ndcg@10", "mrr@10", "recall@100")
MACHINE = ("device", "torch_version", "triton_version", "commit")
RTOL = 0.01

Row = dict[str, object]


def read_runs(folders: Iterable[Path]) -> list[Run]:
    """The finished runs below ``folders``.

    Raises:
        ValueError: in one line: no run at all, one that failed, two of one head and seed, or runs of one study with
            different settings.
    """
    runs = [_read_run(path.parent) for folder in folders for path in sorted(folder.rglob("summary.json"))]
    if not runs:
        raise ValueError("FOLDER: expected folders of finished runs, found no summary.json; name outputs of train.py")
    first: dict[object, Run] = {}
    for run in runs:
        same = first.setdefault((_study(run), run.head, run.seed), run)
        if same is not run:
            raise ValueError(f"{run.folder}: the same dataset, model, head and seed as {same.folder}; name only one")
        like = first.setdefault(_study(run), run)
        names = run.identity.keys() | like.identity
        differ = [name for name in names if run.identity.get(name) != like.identity.get(name)]
        if differ:
            raise ValueError(
                f"{run.folder}: expected the settings of {like.folder} but for head and seed, got other values of"
                f" {', '.join(sorted(differ))}; compare runs of one experiment"
            )
    return runs


def _read_run(folder: Path) -> Run:
    run = read_run(folder, folder.name)
    if not run.finished or not run.config:
        status = run.status if run.config else "without .hydra/config.yaml"
        raise ValueError(f"{folder}: expected a finished run of train.py, got status {status}; run it again")
    return run


def _study(run: Run) -> tuple[str, str]:
    """Dataset and model: runs with the same are compared."""
    return run.dataset, run.model


def studies(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs by dataset and model, those of the naive head first, then by seed.

    Raises:
        ValueError: for a study without the naive head, without another, or with other seeds for one of its heads.
    """
    grouped: dict[tuple[str, str], list[Run]] = {}
    for run in sorted(runs, key=lambda run: (_study(run), run.head != BASELINE, run.head, run.seed)):
        grouped.setdefault(_study(run), []).append(run)
    for study, members in grouped.items():
        seeds = {head: [run.seed for run in members if run.head == head] for head in _heads(members)}
        if BASELINE not in seeds or len(seeds) < 2 or any(s != seeds[BASELINE] for s in seeds.values()):
            raise ValueError(
                f"{' '.join(study)}: expected the head {BASELINE} and another one with the same seeds, got {seeds};"
                f" run train.py -m head={BASELINE},sparton seed=1,2,3"
            )
    return list(grouped.values())


def quality_rows(study: Sequence[Run]) -> list[Row]:
    """A row for each run, for each head's mean, and for each comparison with the naive head, of every language.

    The verdict is that of :func:`reporting.seeds.compare`.
    """
    rows: list[Row] = []
    keys = sorted(key for key in study[0].summary if key == "test/ndcg@10" or key.startswith("test/ndcg@10/"))
    if not keys:
        folder = study[0].folder
        raise ValueError(f"{folder}: expected test/ndcg@10 in summary.json, got none; run with test.enabled=true")
    for key in keys:
        language = key.partition("test/ndcg@10/")[2] or "all"
        values = {head: [_figure(run, key) for run in study if run.head == head] for head in _heads(study)}
        about = {"dataset": study[0].dataset, "model": study[0].model, "language": language}
        for run in study:
            row: Row = {"row": "run"} | about | {"head": run.head, "seed": run.seed, "ndcg@10": run.summary[key]}
            row["untrained_ndcg@10"] = run.summary.get(f"untrained/{key}")
            if language == "all":
                row |= {name: run.summary[f"test/{name}"] for name in MEASURES[1:]}
            rows.append(row | _machine(run))
        for head, figures in values.items():
            mean = {"row": "mean"} | about | {"head": head, "ndcg@10": statistics.fmean(figures)}
            rows.append(mean | {"sd": deviation(figures), "range": max(figures) - min(figures)} | _machine(study[0]))
        for head in list(values)[1:]:
            verdict = {"row": "verdict"} | about | {"head": head} | compare(values[BASELINE], values[head])
            rows.append(verdict | _machine(study[0]))
    return rows


def _figure(run: Run, key: str) -> float:
    """A measure of a run.

    Raises:
        ValueError: if the run has none.
    """
    figure = run.number(key)
    if figure is None:
        got = run.summary.get(key)
        raise ValueError(f"{run.folder}: expected a number for {key} in summary.json, got {got}; run it again")
    return figure


def loss_rows(study: Sequence[Run], rtol: float) -> list[Row]:
    """A row for each step, of the seed with the largest difference of the losses, then one for the largest of all.

    Raises:
        ValueError: where the runs of a seed logged other steps, or none.
    """
    rows: list[Row] = []
    naive = {run.seed: _losses(run) for run in study if run.head == BASELINE}
    for head in _heads(study)[1:]:
        other = {run.seed: _losses(run) for run in study if run.head == head}
        steps = list(naive[next(iter(naive))])
        for run in study:
            if run.head in (BASELINE, head) and list((naive if run.head == BASELINE else other)[run.seed]) != steps:
                raise ValueError(f"{run.folder}: expected losses of {len(steps)} steps as in the others; run it again")
        worst: list[Row] = []
        for step in steps:
            pairs = [(_distance(other[seed][step], naive[seed][step]), seed) for seed in naive]
            difference, seed = max(pairs)
            loss = naive[seed][step]
            row = {"step": step, "seed": seed, "loss_naive": loss, "loss_head": other[seed][step]}
            relative = difference / abs(loss) if loss and difference < math.inf else math.inf
            worst.append(row | {"difference": difference, "relative": relative})
        largest = max(worst, key=lambda row: row["relative"])
        agree = largest["relative"] <= rtol
        verdict = {"verdict": f"{'agree' if agree else 'do not agree'} to {rtol:g} of the loss"}
        about = {"dataset": study[0].dataset, "model": study[0].model, "head": head}
        about |= {"precision": study[0].settings["trainer.precision"], "seeds": len(naive)}
        last = largest | {"step": f"largest, {largest['step']}"} | verdict
        rows += [about | row | _machine(study[0]) for row in [*worst, last]]
    return rows


def _losses(run: Run) -> dict[int, float]:
    """Step to training loss.

    Raises:
        ValueError: if the run has none.
    """
    if not run.losses:
        path = run.folder / "metrics.csv"
        raise ValueError(f"{path}: expected a column train/loss with numbers, got none; run with logger=csv")
    return run.losses


def _distance(a: float, b: float) -> float:
    """|a - b|; infinity where a loss is not finite, so that no maximum passes over it."""
    return abs(a - b) if math.isfinite(a) and math.isfinite(b) else math.inf


def _heads(study: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(run.head for run in study))


def _machine(run: Run) -> Row:
    return {name: run.summary.get(name) for name in MACHINE}


def write(path: Path, rows: Sequence[Row]) -> None:
    """Writes the union of all columns; numbers with six digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = [c for c in dict.fromkeys(column for row in rows for column in row) if c not in MACHINE] + list(MACHINE)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the tables asked for and prints every verdict; returns 1 where one of them is no."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--quality", type=Path, metavar="OUT.csv")
    parser.add_argument("--losses", type=Path, metavar="OUT.csv")
    parser.add_argument("--rtol", type=float, default=RTOL, help="largest relative difference of agreeing losses")
    options = parser.parse_args(arguments)
    if options.quality is None and options.losses is None:
        parser.error("expected --quality or --losses, got neither; name at least one table to write")
    try:
        groups = studies(read_runs(options.folders))
        tables = {}
        if options.quality:
            tables[options.quality] = [row for study in groups for row in quality_rows(study)]
        if options.losses:
            tables[options.losses] = [row for study in groups for row in loss_rows(study, options.rtol)]
    except ValueError as error:
        sys.exit(str(error))
    for path, rows in tables.items():
        write(path, rows)
    verdicts = [row for rows in tables.values() for row in rows if "verdict" in row]
    for row in verdicts:
        where = f"{row['dataset']} {row['model']} {row.get('language', 'losses')}"
        print(f"{where}: {row['head']} against {BASELINE}: {row['difference']:+.4f}, {row['verdict']}")
    return int(not all(row["verdict"].startswith(("equal", "agree")) for row in verdicts))


if __name__ == "__main__":
    sys.exit(main())
