"""Sections on the largest batch, throughput, peak memory, the parts of a step and the warm-up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from reporting.document import Block, Column, Picture, Section, Settings, Table, plain, ratio
from reporting.runs import Run
from reporting.settings import (
    BATCH,
    FOUND,
    PACKED,
    Group,
    baseline,
    columns,
    differing,
    groups,
    in_order,
    names,
    stated,
)  # fmt: skip

MIB_IN_GIB = 1024
PARTS = ("backbone", "head", "loss", "optimizer", "other")
BARS = 18  # as many as a figure has room for
RATE = "perf/samples_per_sec"
COLUMNS = {  # what the columns of the table of throughput mean
    "samples/s": "Samples are queries with their documents; warm-up and compilation are left out.",
    "real tokens/s": "Real tokens are those without padding.",
    "allocated, GiB": "Allocated is what live tensors took at the peak, reserved what was taken from the card.",
    "less memory": "Less memory: what the naive head's run allocates divided by what this one's does.",
    "retries": "Retries: how often the allocator had to give memory back before it could go on, which makes a head"
    " slower next to its limit than with a smaller batch.",
    "process, GiB": "Process is the peak of the whole process, in which earlier runs of a sweep count.",
}


@dataclass(frozen=True)
class Entry:
    """The runs of one label in one group: the same settings with several seeds, or a single run."""

    label: str
    runs: tuple[Run, ...]

    def mean(self, name: str, unit: float = 1.0) -> float | None:
        """Mean of a figure over the finished runs that have it."""
        found = [value for run in self.runs if run.finished and (value := run.number(name)) is not None]
        return fmean(found) / unit if found else None

    @property
    def batch(self) -> float | None:
        """The batch, or the mean of what the searches found."""
        found = [run.batch for run in self.runs if run.batch is not None and (run.largest or not run.searched)]
        return fmean(found) if found else None

    @property
    def samples(self) -> float | None:
        """Queries in a step."""
        return self.mean("perf/batch_size") or (self.batch if self.runs[0].batch_unit == "queries" else None)

    @property
    def parts(self) -> dict[str, float]:
        """Milliseconds of a step by part; empty where they were not measured."""
        found = {part: self.mean(f"perf/{part}_ms") for part in PARTS}
        return {} if None in found.values() else found

    @property
    def note(self) -> str | None:
        """Why there are no figures; None where there are."""
        if any(run.finished for run in self.runs):
            return None
        return "out of memory" if any(run.out_of_memory for run in self.runs) else self.runs[0].status


def entries(group: Group, named: Mapping[str, str]) -> dict[str, Entry]:
    """The group's runs by label; those that did not finish only where no other of that label did."""
    found: dict[str, Entry] = {}
    for label in in_order(named[run.name] for run in group.runs):
        runs = [run for run in group.runs if named[run.name] == label]
        found[label] = Entry(label, tuple([run for run in runs if run.finished] or runs))
    return found


def against(value: float | None, base: float | None) -> float | None:
    """A ratio; None where one side is missing."""
    return value / base if value is not None and base else None


def with_rivals(found: Sequence[Group], named: Mapping[str, str]) -> list[Group]:
    """The groups in which heads can be compared; all of them where there are none."""
    several = [group for group in found if len({named[run.name] for run in group.runs}) > 1]
    return several or list(found)


def same_batch(runs: Sequence[Run], named: Mapping[str, str]) -> list[Group]:
    """Groups of runs with one batch in which something was timed."""
    found = groups([run for run in runs if not run.searched], PACKED)
    return with_rivals([group for group in found if any(run.number(RATE) for run in group.runs)], named)


def own_largest(runs: Sequence[Run], named: Mapping[str, str]) -> list[Group]:
    """Groups of runs that differ in the batch that find_batch found."""
    return with_rivals(groups([run for run in runs if run.searched], (*FOUND, *PACKED)), named)


def rows(
    found: Sequence[Group], named: Mapping[str, str], read: Callable[[Entry, Entry | None], list[Any]]
) -> tuple[list[str], list[list[Any]], frozenset[int]]:
    """Titles of the settings that are columns, a row for each entry, and where groups begin.

    ``read`` gives the cells after the head's label from an entry and the naive head's (None without one).
    """
    titles, told = [name for name in columns(found) if name != "batch"], differing(found)[1]
    lines, starts = [], set()
    for group, one in zip(found, told, strict=True):
        members = entries(group, named)
        base = members.get(baseline(members) or "")
        starts.add(len(lines))
        lines += [[*(one.get(t) for t in titles), label, *read(entry, base)] for label, entry in members.items()]
    return titles, lines, frozenset(starts)


def _columns(titles: Sequence[str], *others: Column) -> list[Column]:
    numeric = {"vocabulary", "longest document", "longest query", "negatives", "steps"}
    return [*(Column(t, t in numeric, 0 if t in numeric else None) for t in titles), Column("head", False), *others]


def _settings(found: Sequence[Group]) -> Settings:
    """What the columns of a table of these groups don't say."""
    return stated(found, beside=(*columns(found), "batch"))


def largest_section(runs: Sequence[Run], named: Mapping[str, str]) -> Section | None:
    """The largest batch of each head by find_batch, with ratios."""
    found = [g for g in own_largest(runs, named) if any(run.largest for run in g.runs)]
    if not found:
        return None
    section = Section("Largest batch")
    for unit in dict.fromkeys(group.runs[0].batch_unit for group in found):
        section.blocks += _largest_blocks([group for group in found if group.runs[0].batch_unit == unit], named, unit)
    return section


def _largest_blocks(found: Sequence[Group], named: Mapping[str, str], unit: str) -> list[Block]:
    """Bars and table of batches that are counted in one unit."""

    def read(entry: Entry, base: Entry | None) -> list[Any]:
        return [
            entry.note or entry.batch, against(entry.batch, base and base.batch),
            entry.mean("find_batch/peak_reserved_mib", MIB_IN_GIB), entry.mean("find_batch/limit_gib"),
            entry.mean("find_batch/tries"),
            entry.mean("find_batch/seconds"),
        ]  # fmt: skip

    titles, lines, starts = rows(found, named, read)
    heads = _columns(
        titles, Column(f"largest batch, {unit}", decimals=0), Column("÷ naive", decimals=2, suffix="×"),
        Column("peak reserved, GiB"), Column("limit, GiB"), Column("tries"), Column("search, s"),
    )  # fmt: skip
    table = Table("Largest batch whose whole training step fits, as find_batch found it", heads, lines, starts)
    return [_settings(found), *_largest_picture(found, named, unit), table]


def _largest_picture(found: Sequence[Group], named: Mapping[str, str], unit: str) -> list[Block]:
    from reporting import figures

    bars: dict[str, dict[str, float]] = {}
    notes: dict[str, dict[str, str]] = {}
    for group, name in zip(found, names(found), strict=True):
        sizes = {label: e.batch for label, e in entries(group, named).items() if e.batch}
        base, name = sizes.get(baseline(sizes) or ""), name or found[0].runs[0].model
        if sizes:
            bars[name] = sizes
            notes[name] = {
                label: f"{size:,.0f}" + (f"  ({ratio(size / base)})" if base and label != baseline(sizes) else "")
                for label, size in sizes.items()
            }
    said = "; ".join(f"{name}: " + ", ".join(f"{la} {no}" for la, no in notes[name].items()) for name in notes)
    caption = f"Largest batch of each head, in {unit}, on a logarithmic axis; in brackets the ratio to the naive head."
    drawing = figures.bars(bars, notes, f"largest batch, {unit}")
    stem = "largest_batch" if unit == "queries" else f"largest_batch_{unit}"
    return [Picture(stem, caption, f"Bars of the largest batch by head. {said}.", drawing)]


def throughput_section(runs: Sequence[Run], named: Mapping[str, str]) -> Section | None:
    """Samples and tokens per second and peak memory, at the same batch and at each head's own largest one."""
    alike, own = same_batch(runs, named), [g for g in own_largest(runs, named) if any(r.number(RATE) for r in g.runs)]
    section = Section("Throughput and memory")
    for found, caption in ((alike, "At the same batch"), (own, "Each head at its own largest batch")):
        if not found:
            continue

        def read(entry: Entry, base: Entry | None, same: bool = found is alike) -> list[Any]:
            memory = "perf/peak_mem_allocated_mib"
            less = against(base and base.mean(memory), entry.mean(memory)) if same else None
            return [
                entry.batch, entry.note or entry.mean("perf/step_ms"), entry.mean(RATE),
                against(entry.mean(RATE), base and base.mean(RATE)), entry.mean("perf/tokens_per_sec"),
                entry.mean(memory, MIB_IN_GIB), less, entry.mean("perf/peak_mem_reserved_mib", MIB_IN_GIB),
                entry.mean("perf/alloc_retries"), entry.mean("perf/peak_rss_mib", MIB_IN_GIB),
                len(entry.runs) if len(entry.runs) > 1 else None,
            ]  # fmt: skip

        titles, lines, starts = rows(found, named, read)
        heads = _columns(
            titles, Column("batch", decimals=0), Column("step, ms"), Column("samples/s"),
            Column("÷ naive", decimals=2, suffix="×"), Column("real tokens/s", decimals=0), Column("allocated, GiB"),
            Column("less memory", decimals=2, suffix="×"), Column("reserved, GiB"), Column("retries", decimals=0),
            Column("process, GiB"), Column("runs"),
        )  # fmt: skip
        table = Table(f"{caption}: throughput and peak memory", heads, lines, starts)
        section.blocks += [_settings(found), table]
    if not section.blocks:
        return None
    told = {column.title for block in section.blocks if isinstance(block, Table) for column in block.columns}
    section.blocks.append(" ".join(sentence for title, sentence in COLUMNS.items() if title in told))
    return section


def parts_section(runs: Sequence[Run], named: Mapping[str, str]) -> Section | None:
    """Where the time of a step goes, as bars and as a table."""
    section = Section("Parts of a step")
    for found, name, what in (
        (own_largest(runs, named), "step_largest", "each head at its own largest batch"),
        (longest_batches(runs, named), "step_same", "heads at the same batch"),
    ):
        timed = [group for group in found if any(entry.parts for entry in entries(group, named).values())]
        if timed:
            section.blocks += _parts_blocks(timed, named, name, what)
    return section if section.blocks else None


def longest_batches(runs: Sequence[Run], named: Mapping[str, str]) -> list[Group]:
    """Of groups that differ in the batch only, the one in which most heads were timed, at the largest batch.

    Where batches were varied, lengths and vocabularies that were not have a figure of their own and are left out.
    """
    best: dict[int, Group] = {}
    families = groups([run for run in runs if not run.searched], (*BATCH, *PACKED))
    for group in same_batch(runs, named):
        family = next(place for place, f in enumerate(families) if group.runs[0] in f.runs)

        def weight(one: Group) -> tuple[int, float]:
            timed = [entry for entry in entries(one, named).values() if entry.mean(RATE)]
            return len(timed), one.runs[0].batch or 0

        if family not in best or weight(group) > weight(best[family]):
            best[family] = group
    several = [place for place in best if len({run.batch for run in families[place].runs}) > 1]
    return [group for place, group in best.items() if place in several or not several]


def _parts_blocks(found: Sequence[Group], named: Mapping[str, str], name: str, what: str) -> list[Block]:
    from reporting import figures

    def read(entry: Entry, base: Entry | None) -> list[Any]:
        share = entry.mean("perf/head_share")
        cells = [entry.parts.get(part) for part in PARTS]
        return [entry.batch, entry.mean("perf/step_ms"), *cells, None if share is None else 100 * share]

    titles, lines, starts = rows(found, named, read)
    heads = _columns(
        titles, Column("batch", decimals=0), Column("step, ms"),
        *(Column(f"{part}, ms") for part in PARTS), Column("head, % of step", decimals=0),
    )  # fmt: skip
    table = Table(f"Parts of a step, {what}; forward and backward together", heads, lines, starts)
    bars = []
    for group, where in zip(found, names(found), strict=True):
        for label, entry in entries(group, named).items():
            if entry.parts and entry.samples:
                bar = (f"{where}\n" if where else "") + f"{label}, batch {plain(entry.batch or entry.samples)}"
                split = {part: value / entry.samples for part, value in entry.parts.items()}
                bars.append((bar, split, f"head {split['head'] / sum(split.values()):.0%}"))
    if not bars:
        return [_settings(found), table]
    said = "; ".join(f"{bar.replace(chr(10), ', ')}: {sum(s.values()):.3g} ms, {note}" for bar, s, note in bars[:BARS])
    caption = f"Milliseconds of a training step for one sample, {what}; beside each bar the head's share."
    if len(bars) > BARS:
        caption += f" The first {BARS} of {len(bars)}; all are in the table."
    drawing = figures.parts(bars[:BARS], "ms of a step for one sample")
    return [_settings(found), Picture(name, caption, f"Stacked bars. {said}.", drawing), table]


def warm_up_section(runs: Sequence[Run], named: Mapping[str, str]) -> Section | None:
    """First step, warm-up and what was compiled in them: all that the other figures leave out."""
    section = Section("Warm-up and compilation")
    figures = ("first_step_s", "warmup_s", "compiled_graphs", "compiled_graphs_timed")

    def read(entry: Entry, base: Entry | None) -> list[Any]:
        return [entry.batch, *(entry.mean(f"perf/{name}") for name in figures)]

    for found, what in (
        (own_largest(runs, named), "each head at its own largest batch"),
        (longest_batches(runs, named), "heads at the same batch"),
    ):
        known = [group for group in found if any(run.number("perf/warmup_s") for run in group.runs)]
        if known:
            titles, lines, starts = rows(known, named, read)
            heads = _columns(
                titles, Column("batch", decimals=0), Column("first step, s"), Column("whole warm-up, s"),
                Column("graphs compiled in it"), Column("graphs compiled after it", decimals=0),
            )  # fmt: skip
            section.blocks.append(Table(f"Warm-up, left out of every other figure, {what}", heads, lines, starts))
    if any(run.number("perf/compiled_graphs") for run in runs):
        section.blocks.append("A graph that an earlier run on the machine compiled may come from torch's cache.")
    return section if section.blocks else None
