"""Which runs can be compared, under which settings, and what the heads are called."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from reporting.document import Settings, text
from reporting.runs import Run

BASELINE = "naive"
HEADS = ("naive", "compiled", "tiled", "sparton")
MODES = ("padded", "text", "flex", "varlen")

# Settings in which compared runs may differ besides head and seed, by the names under which they stand.
PACKED = ("model.packed",)
BATCH = ("batch.size", "batch.tokens", "data.batch_size", "data.batch_tokens")
FOUND = (*BATCH, "find_batch")
LENGTH = ("model.max_doc_length",)
VOCABULARY = ("model.config.vocab_size",)
SPARSITY = ("flops_weight", "regularizer.query.flops.weight", "regularizer.doc.flops.weight")


@dataclass(frozen=True)
class Group:
    """Runs on one device that differ in nothing but head, seed and what was freed."""

    runs: tuple[Run, ...]
    free: tuple[str, ...]


def groups(runs: Iterable[Run], free: Sequence[str]) -> list[Group]:
    """Puts together what can be compared, in the order of the runs; never of two devices or allocators."""
    found: dict[object, list[Run]] = {}
    for run in runs:
        fixed = sorted((name, repr(v)) for name, v in run.identity.items() if not name.startswith(tuple(free)))
        machine = (str(run.summary.get("device")), run.summary.get("alloc_conf"), run.batch_unit)
        found.setdefault((machine, tuple(fixed)), []).append(run)
    return sorted((Group(tuple(members), tuple(free)) for members in found.values()), key=_rank)


def _rank(group: Group) -> list[tuple[bool, float, str]]:
    """Places groups by model, then by the other settings, numbers by their size."""
    told = values(group) | {"batch": group.runs[0].batch}
    known = [told.get(name) for name in SETTINGS]
    return [(isinstance(v, str), v if isinstance(v, (int, float)) else 0.0, str(v)) for v in known]


def labels(runs: Sequence[Run]) -> dict[str, str]:
    """Name of each run to its head's label, which says how the backbone ran where that differs among the runs."""
    modes: dict[str, set[str]] = {}
    for run in runs:
        if run.summary.get("packed"):
            modes.setdefault(run.head, set()).add(str(run.summary["packed"]))
    differ = len(set().union(*modes.values())) > 1
    named = {}
    for run in runs:
        # A failed run doesn't say how its backbone would have run: as it was told to, or as the others with its head,
        # where these agree.
        likely = {"padded"} if run.settings.get(PACKED[0]) is False else modes.get(run.head, set())
        mode = run.summary.get("packed") or (next(iter(likely)) if len(likely) == 1 else None)
        named[run.name] = f"{run.head} ({mode})" if differ and mode else run.head
    return named


def in_order(names: Iterable[str]) -> list[str]:
    """Labels, each once: heads from the naive to the fused one, others after them, padded before packed."""

    def key(label: str) -> tuple[int, str, int]:
        head, _, mode = label.removesuffix(")").partition(" (")
        place = HEADS.index(head) if head in HEADS else len(HEADS)
        return place, head, MODES.index(mode) if mode in MODES else -1

    return sorted(set(names), key=key)


def baseline(names: Iterable[str]) -> str | None:
    """The label that ratios are formed against: the naive head's, padded where there are two; None without one."""
    return next((label for label in in_order(names) if label.split(" ")[0] == BASELINE), None)


def precision(run: Run) -> str | None:
    """What the trainer computed in; ``auto`` is what it means on the run's device."""
    said = run.summary.get("precision") or run.settings.get("trainer.precision")
    if said == "auto":
        on_cpu = str(run.summary.get("device")).startswith("cpu") or run.settings.get("trainer.accelerator") == "cpu"
        return "32-true" if on_cpu else "auto (bf16 where the card has it)"
    return None if said is None else str(said)


def _checkpointing(run: Run) -> str | None:
    said = run.settings.get("model.gradient_checkpointing")
    if said is None or isinstance(said, bool):
        return {None: None, True: "layer by layer", False: "off"}[said]
    return f"{said:,} tokens at a time" if isinstance(said, int) else str(said)


def _optimizer(run: Run) -> str | None:
    lr, decay = run.settings.get("optimizer.lr"), run.settings.get("optimizer.weight_decay")
    return None if lr is None else f"AdamW, lr {lr:g}" + (f", decay {decay:g}" if decay else "")


def _batch(run: Run) -> str | None:
    return None if run.searched or run.batch is None else f"{run.batch:,.0f} {run.batch_unit}"


def _limit(run: Run) -> str | None:
    if not run.searched:
        return ""  # not all runs have this one
    limit, margin = run.settings.get("batch.limit_gib"), run.settings.get("callbacks.batch_finder.margin")
    kept = f", {margin:.3g} of it left free" if margin else ""
    return ("the whole card" if limit is None else f"{limit:g} GiB") + kept


def _calibration(run: Run) -> str | None:
    documents, quantile = run.settings.get("calibrate.documents"), run.settings.get("calibrate.quantile")
    if documents is None or quantile is None:
        return None
    return f"{1 - quantile:.3g} of the words active before training" if documents else "none"


def _loss(run: Run) -> str | None:
    names = [name.split(".")[2] for name in run.settings if name.startswith("loss.losses.")]
    return " + ".join(dict.fromkeys(names)) or None


def _dropout(*names: str) -> Callable[[Run], Any]:
    """The first of the settings that is a number; where they are null, a checkpoint keeps its own."""

    def read(run: Run) -> Any:
        given = [run.settings[name] for name in names if name in run.settings]
        return next((value for value in given if value is not None), "the model's own" if given else None)

    return read


def _allocator(run: Run) -> str | None:
    """The allocator's options, empty for its own; None of a run that doesn't say what it ran on."""
    return run.summary.get("alloc_conf") or ("" if run.summary.get("device") else None)


def _setting(name: str) -> Callable[[Run], Any]:
    return lambda run: run.settings.get(name)


# What a reader needs beside a figure: title, and where it comes from.
SETTINGS: dict[str, Callable[[Run], Any]] = {
    "model": lambda run: run.model,
    "vocabulary": _setting("model.config.vocab_size"),
    "data": lambda run: run.dataset,
    "longest query": _setting("model.max_query_length"),
    "longest document": _setting("model.max_doc_length"),
    "negatives": _setting("data.negatives"),
    "precision": precision,
    "checkpointing": _checkpointing,
    "optimizer": _optimizer,
    "accumulation": _setting("trainer.accumulate_grad_batches"),
    "loss": _loss,
    "FLOPS weight": _setting("flops_weight"),
    "dropout": _dropout("model.dropout"),
    "attention dropout": _dropout("model.attention_dropout", "model.dropout"),
    "calibration": _calibration,
    "steps": _setting("trainer.max_steps"),
    "batch": _batch,
    "memory limit": _limit,
    "device": lambda run: run.summary.get("device"),
    "allocator": _allocator,
}


def values(group: Group) -> dict[str, Any]:
    """The settings that all runs of a group share, by title; a number where the setting is one."""
    found = {}
    for title, read in SETTINGS.items():
        told = {repr(value): value for value in map(read, group.runs) if value not in (None, "unknown")}
        if len(told) == 1 and told.keys() != {"''"}:
            found[title] = next(iter(told.values()))
    return found


def differing(of: Sequence[Group]) -> tuple[list[str], list[dict[str, Any]]]:
    """The titles of settings that tell the groups apart, and each group's values.

    Where the settings that readers know don't, the configuration's own names follow.
    """
    told = [values(group) for group in of]
    titles = [title for title in SETTINGS if len({repr(one.get(title)) for one in told}) > 1]
    seen: dict[object, list[int]] = {}
    for place, one in enumerate(told):
        seen.setdefault(tuple(repr(one.get(title)) for title in titles), []).append(place)
    for alike in seen.values():
        if len(alike) < 2:
            continue
        members = [of[place].runs[0].identity for place in alike]
        names = dict.fromkeys(name for member in members for name in member)
        for name in names:
            if name.startswith(of[0].free) or len({repr(member.get(name)) for member in members}) < 2:
                continue
            titles += [name] if name not in titles else []
            for one, group in zip(told, of, strict=True):
                one[name] = group.runs[0].identity.get(name)
    return titles, told


def telling(of: Sequence[Group]) -> list[str]:
    """As few of the differing settings as tell the groups apart: the names of the groups are made of these."""
    titles, told = differing(of)
    kept: list[str] = []
    for title_ in titles:
        apart = {tuple(repr(one.get(t)) for t in kept) for one in told}
        further = {tuple(repr(one.get(t)) for t in (*kept, title_)) for one in told}
        kept += [title_] if len(further) > len(apart) else []
    return kept


def names(of: Sequence[Group]) -> list[str]:
    """A name for each group: the values of the settings that tell them apart; empty where there is one group."""
    titles, told = telling(of), differing(of)[1]
    return [title(one, titles) for one in told]


def worth_saying(told: dict[str, Any]) -> dict[str, Any]:
    """Settings without those that say that something is not used."""
    unused = {"calibration": "none", "accumulation": 1, "negatives": 0, "dropout": 0.0}
    return {name: value for name, value in told.items() if unused.get(name) != value}


def columns(of: Sequence[Group]) -> list[str]:
    """The differing settings that a table has as columns: those that tell groups apart, and what readers look for."""
    return [name for name in differing(of)[0] if name in (*telling(of), "vocabulary", "longest document")]


def stated(of: Sequence[Group], *, beside: Sequence[str] | None = None) -> Settings:
    """The settings beside a figure of these groups: of all, then of each what neither its name nor a column says.

    Args:
        of: at least one group.
        beside: settings that are columns of a table; the ones that make the groups' names where there is none.
    """
    known = telling(of) if beside is None else beside
    titles, told = differing(of)
    common = {name: value for name, value in worth_saying(told[0]).items() if name not in titles}
    rest = [name for name in titles if name not in known]
    lines = [{name: one[name] for name in rest if one.get(name) is not None} for one in told]
    return Settings(common, list(zip(names(of), lines, strict=True)), _commits(of))


def _commits(of: Sequence[Group]) -> str:
    """A warning where runs of several commits are compared."""
    mixed = [{str(run.summary["commit"])[:10] for run in group.runs if run.summary.get("commit")} for group in of]
    mixed = sorted(set().union(*(commits for commits in mixed if len(commits) > 1)))
    return f"Runs of several commits are compared here: {', '.join(mixed)}." if mixed else ""


def title(one: dict[str, Any], titles: Sequence[str]) -> str:
    """The name of a group among others: the values of what differs."""
    bare = {"model", "data", "device", "precision", "batch", "optimizer"}
    return ", ".join(text(one[t]) if t in bare else f"{t} {text(one[t])}" for t in titles if one.get(t) is not None)
