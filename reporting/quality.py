"""Sections on losses, on quality against sparsity, and on quality over seeds, of each language too."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from reporting import figures
from reporting.document import Block, Column, Picture, Section, Table, text
from reporting.figures import Curves, Scatter
from reporting.runs import Run
from reporting.seeds import EQUAL, compare, deviation
from reporting.settings import PACKED, SPARSITY, Group, baseline, columns, differing, groups, in_order, names, stated
from reporting.speed import with_rivals

NDCG = "test/ndcg@10"
SPARSE = {"test/active_dims_doc": "active dimensions of a document", "test/flops": "FLOPS (products per pair of texts)"}


def loss_section(runs: Sequence[Run], named: Mapping[str, str]) -> Section | None:
    """Loss curves of the studies laid over each other; random texts have no curve worth showing."""
    known = [run for run in runs if len(run.losses) > 1 and not run.synthetic]
    if not known:
        return None
    found = _with_seeds(with_rivals(groups(known, PACKED), named))
    rivals = len({named[run.name] for run in found[0].runs}) > 1
    if not rivals:  # one head only: what it differs in is laid over each other instead
        return _weights(known)
    studies = []
    for group, where in zip(found, names(found), strict=True):
        seeds: dict[str, list[Mapping[int, float]]] = {}
        for run in group.runs:
            seeds.setdefault(named[run.name], []).append(run.losses)
        studies.append(Curves(where, seeds))
    most = max(len(seeds) for study in studies for seeds in study.seeds.values())
    seeds = f" Thin lines are the {most} seeds, the thick one is their mean." if most > 1 else ""
    caption = f"Training loss of each head.{seeds}"
    said = "; ".join(
        f"{study.title or 'the runs'}: " + ", ".join(f"{label} {_ends(s)}" for label, s in study.seeds.items())
        for study in studies
    )
    alt = f"Training loss against step. {said}."
    return Section("Loss curves", [stated(found), Picture("losses", caption, alt, figures.curves(studies))])


def _weights(runs: Sequence[Run]) -> Section:
    """Curves of one head with several weights of the FLOPS regulariser, or other settings."""
    found = groups(runs, PACKED)
    seeds = {where or "all": [run.losses for run in g.runs] for g, where in zip(found, names(found), strict=True)}
    seeds = dict(list(seeds.items())[:7])  # more can't be told apart in one panel
    left = f" The first {len(seeds)} of {len(found)}." if len(seeds) < len(found) else ""
    caption = f"Training loss.{left}"
    alt = "Training loss against step. " + "; ".join(f"{name}: {_ends(s)}" for name, s in seeds.items()) + "."
    return Section("Loss curves", [stated(found), Picture("losses", caption, alt, figures.curves([Curves("", seeds)]))])


def _ends(seeds: Sequence[Mapping[int, float]]) -> str:
    first, last = (fmean(pick(run.items())[1] for run in seeds) for pick in (min, max))
    return f"from {first:.3g} to {last:.3g}"


def sparsity_section(runs: Sequence[Run], named: Mapping[str, str]) -> Section | None:
    """nDCG@10 against active dimensions and against FLOPS."""
    known = [run for run in runs if run.finished and run.number(NDCG) is not None]
    found = groups([run for run in known if all(run.number(name) for name in SPARSE)], (*SPARSITY, *PACKED))
    found = [g for g in found if len({run.settings.get("flops_weight") for run in g.runs}) > 1] or found
    panels, said = [], []
    for group, where in zip(found, names(found) if found else [], strict=True):
        bm25 = next((b for run in group.runs if (b := run.number("bm25/test/ndcg@10")) is not None), None)
        varied = len({run.settings.get("flops_weight") for run in group.runs}) > 1
        for name, across in SPARSE.items():
            points: dict[str, list[tuple[float, float, str]]] = {}
            for run in group.runs:
                word = text(run.settings.get("flops_weight")) if varied else ""
                points.setdefault(named[run.name], []).append((run.number(name), run.number(NDCG), word))
            panels.append(Scatter(where, points, across, bm25))
            for label in in_order(points):
                ends = [f"{y:.3f} at {x:.3g}" for x, y, _ in (min(points[label]), max(points[label]))]
                said.append(f"{panels[-1].title} {label}, {across}: {' to '.join(dict.fromkeys(ends))}".strip())
    if not panels:
        return None
    words = " The number beside a point is the weight of the FLOPS regulariser." if any(
        word for panel in panels for points in panel.points.values() for *_, word in points
    ) else ""  # fmt: skip
    caption = f"Quality against sparsity, test split.{words}"
    picture = Picture("sparsity", caption, f"nDCG@10 against sparsity. {'; '.join(said)}.", figures.scatter(panels))
    return Section("Quality against sparsity", [stated(found), picture])


def seeds_section(runs: Sequence[Run], named: Mapping[str, str]) -> Section | None:
    """Mean quality of each head over its seeds, and whether it equals the naive head's; then language by language."""
    found = _judged(runs)
    if not found:
        return None
    titles, told = columns(found), differing(found)[1]
    lines, starts = [], set()
    for group, one in zip(found, told, strict=True):
        starts.add(len(lines))
        values = _values(group, named, NDCG)
        for label, seeds in values.items():
            known, verdict = list(seeds.values()), _verdict(values, label)
            own = [run for run in group.runs if named[run.name] == label]
            lines.append([
                *(one.get(t) for t in titles), label, len(known), fmean(known), deviation(known),
                verdict.get("difference"), verdict.get("allowed"), _short(verdict),
                *(_mean(own, name) for name in ("test/mrr@10", "test/recall@100", "untrained/test/ndcg@10",
                                                "bm25/test/ndcg@10", "test/active_dims_query", "test/active_dims_doc")),
            ])  # fmt: skip
    heads = [
        *(Column(t, False) for t in titles), Column("head", False), Column("seeds"), Column("nDCG@10", decimals=3),
        Column("sd", decimals=4), Column("− naive", decimals=4, signed=True), Column("allowed", decimals=4),
        Column("verdict", False), Column("MRR@10", decimals=3), Column("recall@100", decimals=3),
        Column("untrained", decimals=3), Column("BM25", decimals=3), Column("dims query"), Column("dims doc"),
    ]  # fmt: skip
    table = Table("Quality on the test split, mean over seeds", heads, lines, frozenset(starts))
    note = (
        "Equal is within the spread of the seeds: means that differ by at most two pooled standard deviations over the"
        " same seeds (the column allowed). Undecided: so much is allowed, more than a tenth of the naive head's mean,"
        " that it would hide a real difference (one seed collapsed, for example). Several runs of one head and seed"
        " count as one, their mean. Untrained and BM25 are nDCG@10 of the model before training and of BM25."
    )
    blocks: list[Block] = [stated(found, beside=titles), table, note]
    for group, where in zip(found, names(found), strict=True):
        drawn = sum(isinstance(block, Picture) for block in blocks)
        blocks += _languages(group, where, named, f"languages_{drawn + 1}" if drawn else "languages")
    return Section("Quality of the heads", blocks)


def _languages(group: Group, where: str, named: Mapping[str, str], name: str) -> list[Block]:
    keys = sorted({key for run in group.runs for key in run.summary if key.startswith(f"{NDCG}/")})
    if not keys:
        return []
    lines, drawn, starts = [], [], set()
    for key in keys:
        values, language = _values(group, named, key), key.removeprefix(f"{NDCG}/")
        starts.add(len(lines))
        drawn.append((language, {la: (fmean(v.values()), deviation([*v.values()]) or 0.0) for la, v in values.items()}))
        for label, seeds in values.items():
            verdict = _verdict(values, label)
            lines.append([
                language, label, len(seeds), fmean(seeds.values()), deviation([*seeds.values()]),
                verdict.get("difference"), verdict.get("allowed"), _short(verdict),
            ])  # fmt: skip
    heads = [
        Column("language", False), Column("head", False), Column("seeds"), Column("nDCG@10", decimals=3),
        Column("sd", decimals=4), Column("− naive", decimals=4, signed=True), Column("allowed", decimals=4),
        Column("verdict", False),
    ]  # fmt: skip
    said = "; ".join(f"{la}: " + ", ".join(f"{h} {m:.3f}" for h, (m, _) in row.items()) for la, row in drawn)
    caption = f"nDCG@10 by language{', ' + where if where else ''}: mean and standard deviation over seeds."
    picture = Picture(name, caption, f"nDCG@10 by language. {said}.", figures.languages(drawn))
    return [picture, Table(f"nDCG@10 by language{', ' + where if where else ''}", heads, lines, frozenset(starts))]


def _values(group: Group, named: Mapping[str, str], key: str) -> dict[str, dict[Any, float]]:
    """Label to seed to figure; of several runs with one seed to their mean."""
    found: dict[str, dict[Any, list[float]]] = {label: {} for label in in_order(named[run.name] for run in group.runs)}
    for run in group.runs:
        if (value := run.number(key)) is not None:
            found[named[run.name]].setdefault(run.seed, []).append(value)
    return {label: {seed: fmean(v) for seed, v in seeds.items()} for label, seeds in found.items() if seeds}


def _verdict(values: Mapping[str, Mapping[Any, float]], label: str) -> dict[str, Any]:
    """The comparison with the naive head over the seeds that both have; empty for that head itself."""
    base = baseline(values)
    if base is None or label == base:
        return {}
    both = sorted(set(values[base]) & set(values[label]), key=str)
    if not both:
        return {"verdict": "no seed in common with the naive head"}
    return compare(*([values[of][seed] for seed in both] for of in (base, label))) | {"seeds": len(both)}


def verdicts(runs: Sequence[Run], named: Mapping[str, str]) -> list[tuple[str, str, dict[str, Any], int]]:
    """For the top of the page: study, label, comparison with the naive head and number of seeds."""
    found = _judged(runs)
    told_all = []
    for group, name in zip(found, names(found) if found else [], strict=True):
        values = _values(group, named, NDCG)
        for label in values:
            verdict = _verdict(values, label)
            if verdict.get("allowed") is not None:
                where = name or f"{group.runs[0].dataset}, {group.runs[0].model}"
                told_all.append((where, label, verdict, verdict["seeds"]))
    return told_all


def _judged(runs: Sequence[Run]) -> list[Group]:
    """Studies of finished runs whose quality was measured."""
    return _with_seeds(groups([run for run in runs if run.finished and run.number(NDCG) is not None], PACKED))


def _with_seeds(found: Sequence[Group]) -> list[Group]:
    """The studies of several seeds; all where there are none. Sweeps are in the figure of quality against sparsity."""
    return [group for group in found if len({run.seed for run in group.runs}) > 1] or list(found)


def _short(verdict: Mapping[str, Any]) -> str | None:
    """The verdict in a column, whose meaning stands below the table."""
    said = verdict.get("verdict")
    return said and said.replace(EQUAL, "equal").partition(":")[0]


def _mean(runs: Sequence[Run], name: str) -> float | None:
    found = [value for run in runs if (value := run.number(name)) is not None]
    return fmean(found) if found and not math.isnan(fmean(found)) else None
