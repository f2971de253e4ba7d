"""Puts a report together from runs: what was found, in sentences, then every section that there are figures for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from reporting import provenance, quality, speed, sweeps
from reporting.document import Block, Report, Settings, listed, plain, ratio
from reporting.runs import Run
from reporting.settings import Group, baseline, in_order, labels, names, values, worth_saying
from reporting.speed import RATE, Entry, entries


def build(runs: Sequence[Run], problems: Sequence[str] = ()) -> Report:
    """Builds the report.

    Speed and memory are told of runs on synthetic texts where one of these finished, else of all; quality of others.

    Args:
        runs: finished or not.
        problems: a line for each run that could not be read.
    """
    timed = [run for run in runs if run.synthetic]
    timed = timed if any(run.finished for run in timed) else list(runs)
    judged = [run for run in runs if not run.synthetic]
    of_timed, of_judged = labels(timed), labels(judged)
    sections = [
        speed.largest_section(timed, of_timed),
        speed.throughput_section(timed, of_timed),
        *sweeps.sections(timed, of_timed),
        speed.parts_section(timed, of_timed),
        speed.warm_up_section(timed, of_timed),
        quality.seeds_section(judged, of_judged),
        quality.sparsity_section(judged, of_judged),
        quality.loss_section(judged, of_judged),
        provenance.failures_section(runs, problems),
        provenance.machine_section(runs),
        provenance.all_runs_section(runs, timed),
    ]
    found = [section for section in sections if section]
    everywhere = worth_saying(values(Group(tuple(runs), ())))
    for section in found:
        section.blocks = [_without(block, everywhere) for block in section.blocks]
    heads, models = in_order(run.head for run in runs), dict.fromkeys(run.model for run in runs)
    about = f"{_words(heads)} on {_words(models)}: {_status(runs)}, {_devices(runs)}."
    settings = f"Settings of all runs: {listed(everywhere)}." if everywhere else ""
    return Report("Sparton: heads compared", about, _findings(timed, of_timed, judged, of_judged), settings, found)


def _without(block: Block, everywhere: Mapping[str, object]) -> Block:
    """Settings without those that are said of all runs already; any other block as it is."""
    if not isinstance(block, Settings):
        return block
    return replace(block, common={name: value for name, value in block.common.items() if name not in everywhere})


def _findings(
    timed: Sequence[Run], of_timed: Mapping[str, str], judged: Sequence[Run], of_judged: Mapping[str, str]
) -> list[str]:
    """Sentences with ratios to the naive head, each computed from runs that differ in nothing else."""
    own = speed.own_largest(timed, of_timed)
    lines = _best(own, of_timed, lambda e: e.batch, "{head} fits {ratio} the batch of {base}{rival}", " {unit}")
    lines += _best(
        own, of_timed, lambda e: e.mean(RATE),
        "each at its own largest batch, {head} has {ratio} the throughput of {base}{rival}", " samples/s",
    )  # fmt: skip
    lines += _best(
        speed.longest_batches(timed, of_timed), of_timed, lambda e: e.mean(RATE),
        "at a batch of {batch}, {head} has {ratio} the throughput of {base}{rival}", " samples/s",
    )  # fmt: skip
    for where, label, verdict, seeds in quality.verdicts(judged, of_judged):
        line = f"mean nDCG@10 of {label} over {seeds} seeds is {verdict['verdict']}"
        difference = f"{verdict['difference']:+.4f}".replace("-", "−")
        lines.append(f"{where}: {line} ({difference}, allowed {verdict['allowed']:.4f}).")
    return lines


def _best(
    found: Sequence[Group], named: Mapping[str, str], read: Callable[[Entry], float | None], sentence: str, unit: str
) -> list[str]:
    """A sentence for each group in which the head with the largest value can be set against the naive one."""
    lines = []
    for group, where in zip(found, names(found) if found else [], strict=True):
        known = {label: (value, entry) for label, entry in entries(group, named).items() if (value := read(entry))}
        base = baseline(known)
        others = [label for label in known if label != base]
        if base is None or not others:
            continue
        head = max(others, key=lambda label: known[label][0])
        rival = next((label for label in others if label.split(" ")[0] == "compiled" and label != head), None)
        shown = [known[label][0] for label in (head, base, rival) if label]
        told = f" and {ratio(known[head][0] / known[rival][0])} that of {rival}" if rival else ""
        line = sentence.format(
            head=head, base=base, ratio=ratio(known[head][0] / known[base][0]), rival=told, batch=_batch(known[head][1])
        )
        line = line if where or line.startswith(head) else line[0].upper() + line[1:]
        figures = f"{_words(map(plain, shown))}{unit.format(unit=group.runs[0].batch_unit)}"
        lines.append((f"{where}: " if where else "") + f"{line}: {figures}.")
    return lines


def _batch(entry: Entry) -> str:
    return "?" if entry.batch is None else plain(entry.batch)


def _status(runs: Sequence[Run]) -> str:
    done, counted = sum(run.finished for run in runs), f"{len(runs)} run{'s' if len(runs) > 1 else ''}"
    return f"{counted}, all finished" if done == len(runs) else f"{counted}, {done} finished"


def _devices(runs: Sequence[Run]) -> str:
    known = dict.fromkeys(str(run.summary["device"]) for run in runs if run.summary.get("device"))
    return f"on {_words(known)}" if known else "on a device that no summary names"


def _words(parts: Iterable[object]) -> str:
    *most, last = map(str, parts)
    return f"{', '.join(most)} and {last}" if most else last
