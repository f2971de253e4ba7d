"""Dashboards in wandb as code: a workspace and a report with the same panels.

    python -m reporting.dashboards ENTITY/PROJECT           # creates both, or updates them
    python -m reporting.dashboards ENTITY/PROJECT --print   # what would be sent, as JSON; needs no network

Runs are grouped by model and head, so that each bar and each line is the mean of such a group.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2 import Panel as WandbPanel
    from wandb_workspaces.reports.v2 import Report
    from wandb_workspaces.workspaces import Section as WandbSection
    from wandb_workspaces.workspaces import Workspace

TITLE = "Sparton"
# The workspace's name in its address (?nw=sparton): always the same, so that a second call finds the first one's.
VIEW = "sparton"
# Lightning's logger counts its own calls as wandb's step; this is the training step.
STEP = "trainer/global_step"
# Keys of the configuration that `train.py` logs. wandb keeps it nested: head.name is {"head": {"name": ...}}.
GROUPING = ("model.name_or_path", "head.name")
CONFIG_COLUMNS = (*GROUPING, "batch.size", "seed")
SUMMARY_COLUMNS = ("test/ndcg@10", "test/flops", "perf/samples_per_sec", "perf/peak_mem_allocated_mib")
ACROSS = 3
MOST_RUNS = 50  # in a panel; wandb shows ten unless told
CONNECT_SECONDS = 20
SIDES = ("query", "doc")
REGULARIZERS = ("flops", "df_flops", "l1", "anti_zero")


class Panel(NamedTuple):
    """One panel: ``bars`` of last values, ``lines`` over training steps, or a ``scatter`` of two metrics, x then y."""

    kind: Literal["bars", "lines", "scatter"]
    title: str
    metrics: tuple[str, ...]


class Section(NamedTuple):
    """A heading, a sentence on how to read what follows, and the panels."""

    name: str
    text: str
    panels: tuple[Panel, ...]


SECTIONS = (
    Section(
        "Memory",
        "Peak memory of training after the warm-up, in MiB: allocated is what live tensors take, reserved what the "
        "process takes from the driver. On the CPU it is the whole process's. The largest batch is found by "
        "find_batch, where a run asked for it.",
        (
            Panel("bars", "Peak memory allocated (MiB)", ("perf/peak_mem_allocated_mib",)),
            Panel("bars", "Peak memory reserved (MiB)", ("perf/peak_mem_reserved_mib",)),
            Panel("bars", "Peak memory of the process, CPU (MiB)", ("perf/peak_rss_mib",)),
            Panel("bars", "Largest batch (queries)", ("find_batch/size",)),
            Panel("bars", "Memory reserved at the largest batch (MiB)", ("find_batch/peak_reserved_mib",)),
            Panel("bars", "Batch (queries)", ("perf/batch_size",)),
        ),
    ),
    Section(
        "Throughput",
        "Real tokens, without padding; a sample is a query with its documents. Compare heads at the same batch, or "
        "each at its own largest. The parts of a step add up to it.",
        (
            Panel("bars", "Samples per second", ("perf/samples_per_sec",)),
            Panel("bars", "Tokens per second", ("perf/tokens_per_sec",)),
            Panel("bars", "A training step (ms)", ("perf/step_ms",)),
            Panel(
                "bars",
                "Parts of a step (ms)",
                ("perf/backbone_ms", "perf/head_ms", "perf/loss_ms", "perf/optimizer_ms", "perf/other_ms"),
            ),
            Panel("bars", "Share of the head in a step", ("perf/head_share",)),
            Panel("lines", "Samples per second over training", ("perf/samples_per_sec",)),
            Panel("lines", "Tokens per second over training", ("perf/tokens_per_sec",)),
            Panel("lines", "A training step over training (ms)", ("perf/step_ms",)),
        ),
    ),
    Section(
        "Sparsity",
        "Active dimensions are the words with a weight above zero in a text. In training, flops is the regulariser's "
        "measure of a batch; test/flops is the expected number of products for a pair of a query and a document.",
        (
            *(Panel("lines", f"Active dimensions, {side}", (f"train/active_dims_{side}",)) for side in SIDES),
            *(Panel("lines", f"FLOPS of a batch, {side}", (f"train/flops_{side}",)) for side in SIDES),
            Panel("bars", "FLOPS, test", ("test/flops",)),
            Panel("bars", "Active dimensions, test", tuple(f"test/active_dims_{side}" for side in SIDES)),
        ),
    ),
    Section(
        "Quality",
        "val_pool is a small fixed pool that chooses the checkpoint: follow it within a run. test is the whole "
        "collection, once, at the end: compare runs by it. Seeds of one setting differ, so count several.",
        (
            Panel("lines", "nDCG@10, validation pool", ("val_pool/ndcg@10",)),
            Panel("bars", "nDCG@10, test", ("test/ndcg@10",)),
            Panel("bars", "MRR@10, test", ("test/mrr@10",)),
            Panel("bars", "recall@100, test", ("test/recall@100",)),
            Panel("scatter", "nDCG@10 against FLOPS, test", ("test/flops", "test/ndcg@10")),
            Panel("scatter", "nDCG@10 against active dimensions, test", ("test/active_dims_doc", "test/ndcg@10")),
        ),
    ),
    Section(
        "Losses",
        "The total is what is trained on; its parts and the penalties are shown without their weights. Heads that "
        "compute the same thing have the same curves.",
        (
            Panel("lines", "Total", ("train/loss",)),
            Panel("lines", "Ranking losses", ("train/loss_contrastive", "train/loss_margin_mse", "train/loss_kl")),
            *(
                Panel("lines", f"Penalties, {side}", tuple(f"train/reg_{name}_{side}" for name in REGULARIZERS))
                for side in SIDES
            ),
        ),
    ),
)


def draw(panel: Panel) -> WandbPanel:
    """Returns the panel as wandb-workspaces knows it."""
    import wandb_workspaces.reports.v2 as wr

    if panel.kind == "bars":
        return wr.BarPlot(title=panel.title, metrics=list(panel.metrics))
    if panel.kind == "lines":
        return wr.LinePlot(title=panel.title, x=STEP, y=list(panel.metrics))
    x, y = panel.metrics
    return wr.ScatterPlot(title=panel.title, x=x, y=y)


def columns() -> list[str]:
    """Returns the pinned columns of the table of runs; wandb puts ``value`` after a key's first part."""
    keys = (key.partition(".") for key in CONFIG_COLUMNS)
    return [f"config:{first}.value{dot}{rest}" for first, dot, rest in keys] + [f"summary:{m}" for m in SUMMARY_COLUMNS]


def make_workspace(entity: str, project: str) -> Workspace:
    """Returns the workspace, not yet saved: a section for each of ``SECTIONS``."""
    import wandb_workspaces.workspaces as ws

    def section(part: Section) -> WandbSection:
        layout = ws.SectionLayoutSettings(columns=ACROSS, rows=-(-len(part.panels) // ACROSS))
        panels = [draw(panel) for panel in part.panels]
        return ws.Section(name=part.name, panels=panels, is_open=True, layout_settings=layout)

    workspace = ws.Workspace(
        entity=entity,
        project=project,
        name=TITLE,
        sections=[section(part) for part in SECTIONS],
        settings=ws.WorkspaceSettings(max_runs=MOST_RUNS),
        runset_settings=ws.RunsetSettings(groupby=[ws.Config(key) for key in GROUPING], pinned_columns=columns()),
    )
    workspace._internal_name = f"nw-{VIEW}-v"
    return workspace


def make_report(entity: str, project: str) -> Report:
    """Returns the report, not yet saved: for each of ``SECTIONS`` a heading, its text and its panels."""
    import wandb_workspaces.reports.v2 as wr

    grouping = [f"config.{key}" for key in GROUPING]
    blocks = [wr.TableOfContents()]
    for part in SECTIONS:
        # Without an entity and a project of its own it shows the runs of the report's project, and asks no server.
        runset = wr.Runset(name="Runs by model and head", groupby=grouping, pinned_columns=columns())
        grid = wr.PanelGrid(runsets=[runset], panels=[draw(panel) for panel in part.panels])
        blocks += [wr.H2(part.name), wr.P(part.text), grid]
    description = "Memory, throughput, sparsity and quality by model and head."
    return wr.Report(entity=entity, project=project, title=TITLE, description=description, blocks=blocks, width="fluid")


def specification(*dashboards: Workspace | Report) -> dict[str, Any]:
    """Returns what saving would send, by the name of each one's class; nothing is asked of a server."""
    return {
        type(each).__name__.lower(): each._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)
        for each in dashboards
    }


def save(workspace: Workspace, report: Report) -> list[str]:
    """Saves both, over those that an earlier call made; returns a line for each: what was done, and its address.

    Raises:
        ValueError: where the project doesn't exist.
        Exception: whatever wandb raises where it can't connect or isn't allowed to.
    """
    import wandb
    import wandb_workspaces.workspaces as ws

    path = f"{workspace.entity}/{workspace.project}"
    # Fails within seconds without a network or with a wrong key, before anything is sent.
    known = wandb.Api(timeout=CONNECT_SECONDS).reports(path)
    # The description too: a report that someone else gave this title is not overwritten.
    own = (report.title, report.description)
    report.id = next((each.id for each in known if (each.display_name, each.description) == own), "")
    try:
        # Of an address only the path and the view's name are read.
        workspace._internal_id = ws.Workspace.from_url(f"https://wandb.ai/{path}?nw={VIEW}")._internal_id
    except ValueError as problem:
        if "not found" not in str(problem):
            raise
    done = ["updated" if known else "created" for known in (workspace._internal_id, report.id)]
    workspace.save()
    report.save()
    return [f"workspace {done[0]}: {workspace.url}", f"report {done[1]}: {report.url}"]


def obstacle() -> str | None:
    """Returns what is missing for saving and its remedy, in one line; None where nothing is."""
    # Brings Lightning along, which --help and --print need not wait for.
    from lightning_modules.wandb import choose_mode, has_key

    if not has_key():
        return (
            "no wandb key in WANDB_API_KEY or the netrc file: set WANDB_API_KEY, run `wandb login`, "
            "or see what would be sent with --print"
        )
    if choose_mode() != "online":
        return f"WANDB_MODE is {choose_mode()}, and dashboards lie on the server: unset it, or use --print"
    return None


def main(argv: list[str] | None = None) -> int:
    """Saves the dashboards or prints them; an obstacle is one line and exit status 1."""
    parser = argparse.ArgumentParser(
        prog="python -m reporting.dashboards",
        description="Creates a wandb workspace and a report of memory, throughput, sparsity, quality and losses by "
        "model and head; where they exist, they are updated.",
    )
    parser.add_argument("project", metavar="ENTITY/PROJECT", help="where the runs are (logger.wandb.project=PROJECT)")
    parser.add_argument("--print", action="store_true", dest="show", help="only print what would be sent, as JSON")
    arguments = parser.parse_args(argv)
    if not re.fullmatch(r"[^/\\#?%:\s]+/[^/\\#?%:]+", arguments.project):
        parser.error(f"expected ENTITY/PROJECT, got {arguments.project!r}: for example my-team/sparton")
    if importlib.util.find_spec("wandb_workspaces") is None:
        return fail("wandb-workspaces is not installed: pip install -c constraints.txt -e '.[dashboards]'")
    path = arguments.project.split("/")
    workspace, report = make_workspace(*path), make_report(*path)
    if arguments.show:
        print(json.dumps(specification(workspace, report), indent=2))
        return 0
    if (missing := obstacle()) is not None:
        return fail(missing)
    try:
        print("\n".join(save(workspace, report)))
    except Exception as problem:  # noqa: BLE001 - wandb's errors have no common class
        said = " ".join(str(problem).split())[:300]
        return fail(f"{arguments.project}: wandb says: {said}; check name, key and network, or use --print")
    return 0


def fail(line: str) -> int:
    """Prints the line to stderr and returns the exit status."""
    print(f"dashboards: {line}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
