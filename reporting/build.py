"""Puts a report together from runs: what was found, in sentences, then every section that there are figures for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from reporting import provenance, quality, speed, sweeps
from reporting.document import Report, plain, ratio
from reporting.runs import Run
from reporting.settings import Group, baseline, differing, in_order, labels, title
from reporting.speed import Entry, entries


def build(runs: Sequence[Run], problems: Sequence[str] = ()) -> Report:
    """Builds the report.

    Args:
        runs: finished or not.
        problems: a line for each run that could not be read.
    """
    named = labels(runs)
    sections = [
        speed.largest_section(runs, named),
        speed.throughput_section(runs, named),
        *sweeps.sections(runs, named),
        speed.parts_section(runs, named),
        speed.warm_up_section(runs, named),
        quality.seeds_section(runs, named),
        quality.sparsity_section(runs, named),
        quality.loss_section(runs, named),
        provenance.failures_section(runs, named, problems),
        provenance.machine_section(runs),
        provenance.all_runs_section(runs, named),
    ]
    heads, models = in_order(named.values()), dict.fromkeys(run.model for run in runs)
    about = f"{_words(heads)} on {_words(models)}: {_status(runs)}, {_devices(runs)}."
    return Report("Sparton: heads compared", about, findings(runs, named), [section for section in sections if section])


def findings(runs: Sequence[Run], named: Mapping[str, str]) -> list[str]:
    """Sentences with ratios to the naive head, each computed from runs that differ in nothing else."""
    lines = _best(
        speed.own_largest(runs, named), named, lambda e: e.batch,
        "{head} trains {ratio} larger batches than {base} ({value} against {other} {unit})",
    ) + _best(
        speed.own_largest(runs, named), named, lambda e: e.mean(speed.RATE),
        "each at its own largest batch, {head} trains {ratio} the samples/s of {base} ({value} against {other})",
    )  # fmt: skip
    same = speed.same_batch(runs, named)
    lines += _best(
        speed._longest_batches(runs, named), named, lambda e: e.mean(speed.RATE),
        "at batch {batch}, {head} trains {ratio} the samples/s of {base} ({value} against {other})",
    ) if same else []  # fmt: skip
    for where, label, verdict, seeds in quality.verdicts(runs, named):
        lines.append(
            f"{where}: mean nDCG@10 of {label} over {seeds} seeds is {verdict['verdict']}"
            f" ({verdict['difference']:+.4f}, allowed {verdict['allowed']:.4f}).".replace("(-", "(−")
        )
    return lines


def _best(found: Sequence[Group], named: Mapping[str, str], read, sentence: str) -> list[str]:
    """A sentence for each group in which the head with the largest value can be set against the naive one."""
    titles, told = differing(found) if found else ([], [])
    titles = [name for name in titles if name != "batch"]
    lines = []
    for group, one in zip(found, told, strict=True):
        values = {label: (value, entry) for label, entry in entries(group, named).items() if (value := read(entry))}
        base = baseline(values)
        if base is None or len(values) < 2:
            continue
        head = max(values, key=lambda label: values[label][0])
        if head == base:
            head = max((label for label in values if label != base), key=lambda label: values[label][0])
        (value, entry), (other, _) = values[head], values[base]
        where = title(one, titles)
        line = sentence.format(
            head=head, base=base, ratio=ratio(value / other), value=plain(value), other=plain(other),
            unit=group.runs[0].batch_unit, batch=_batch(entry),
        )  # fmt: skip
        lines.append((f"{where}: " if where else "") + f"{line}{_rival(values, head, base)}.")
    return lines


def _rival(values: Mapping[str, tuple[float, Entry]], head: str, base: str) -> str:
    """What the head is to the compiled one, where that ran too."""
    rival = next((label for label in values if label.split(" ")[0] == "compiled" and label not in (head, base)), None)
    return f"; {ratio(values[head][0] / values[rival][0])} that of {rival}" if rival else ""


def _batch(entry: Entry) -> str:
    return "?" if entry.batch is None else plain(entry.batch)


def _status(runs: Sequence[Run]) -> str:
    done = sum(run.finished for run in runs)
    counted = f"{len(runs)} run" + ("s" if len(runs) > 1 else "")
    if done == len(runs):
        return f"{counted}, all finished"
    return f"{counted}, {done} finished"


def _devices(runs: Sequence[Run]) -> str:
    names = dict.fromkeys(str(run.summary["device"]) for run in runs if run.summary.get("device"))
    return f"on {_words(names)}" if names else "on a device that no summary names"


def _words(names) -> str:
    *most, last = map(str, names)
    return f"{', '.join(most)} and {last}" if most else last
