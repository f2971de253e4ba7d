"""reporting.dashboards: the panels, their metrics and keys against a real run, what is sent, errors in one line."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from data_helpers import write_collection
from hydra import compose, initialize_config_dir
from lightning.pytorch import Callback
from omegaconf import OmegaConf

from lightning_modules.resolvers import CONF, REPOSITORY, register_resolvers
from reporting import dashboards

wandb = pytest.importorskip("wandb")
pytest.importorskip("wandb_workspaces")

PANELS = [panel for section in dashboards.SECTIONS for panel in section.panels]
GROUPING = [{"section": "config", "name": "model.value.name_or_path"}, {"section": "config", "name": "head.value.name"}]
KEY = "0123456789abcdef" * 3


class Counted(Callback):
    """Leaves a whole number in the summary, as the finder of the largest batch does."""

    def summary(self) -> dict[str, int]:
        return {"counted/whole": 4}


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The keys that wandb got from a real run without a network, and that run's config."""
    import train

    folder = tmp_path_factory.mktemp("run")
    seen = SimpleNamespace(keys=set(), config={})
    log = wandb.Run.log

    def record(self: Any, data: dict[str, Any], *arguments: Any, **keywords: Any) -> None:
        seen.keys |= data.keys()
        seen.config |= dict(self.config)
        log(self, data, *arguments, **keywords)

    register_resolvers()
    small = [f"model.config.{name}=16" for name in ("hidden_size", "intermediate_size")]
    small += ["model.config.num_hidden_layers=1", "model.max_query_length=16", "model.max_doc_length=16", "trainer=cpu"]
    small += ["batch.size=4", "data=beir", f"data.path={write_collection(folder / 'data')}", "data.val_pool=12"]
    small += ["trainer.max_steps=11", "trainer.val_check_interval=6", "trainer.log_every_n_steps=1"]
    small += [f"+callbacks.counted._target_={__name__}.Counted"]
    small += ["test.untrained=false", f"paths.output_dir={folder / 'run'}"]
    with pytest.MonkeyPatch.context() as patch, initialize_config_dir(str(CONF), version_base="1.3"):
        patch.setenv("WANDB_MODE", "offline")
        patch.setattr(wandb.Run, "log", record)
        train.train(compose("train", small))
    return seen


@pytest.fixture(scope="module")
def spec() -> dict[str, Any]:
    return dashboards.specification(*dashboards_of("me", "runs"))


def dashboards_of(*path: str) -> tuple[Any, Any]:
    return dashboards.make_workspace(*path), dashboards.make_report(*path)


def shown(panel: dict[str, Any]) -> dashboards.Panel:
    """A panel of a specification as a `Panel`."""
    config = panel["config"]
    if panel["viewType"] == "Scatter Plot":
        axes = tuple(config[axis].removeprefix("summary:") for axis in ("xAxis", "yAxis"))
        return dashboards.Panel("scatter", config["chartTitle"], axes)
    kind = {"Bar Chart": "bars", "Run History Line Plot": "lines"}[panel["viewType"]]
    assert kind == "bars" or config["xAxis"] == "trainer/global_step"
    return dashboards.Panel(kind, config["chartTitle"], tuple(config["metrics"]))


def grids(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [block["metadata"] for block in spec["report"]["spec"]["blocks"] if block["type"] == "panel-grid"]


def without_ids(value: Any) -> Any:
    """The library draws panels' and run sets' ids at random."""
    if isinstance(value, dict):
        return {key: without_ids(item) for key, item in value.items() if key not in ("__id__", "id")}
    return [without_ids(item) for item in value] if isinstance(value, list) else value


def test_workspace_and_report_show_the_same_panels_in_the_same_sections(spec):
    sections = spec["workspace"]["spec"]["section"]["panelBankConfig"]["sections"]
    workspace = {part["name"]: [shown(panel) for panel in part["panels"]] for part in sections}
    blocks = spec["report"]["spec"]["blocks"]
    headings = [block["children"][0]["text"] for block in blocks if block["type"] == "heading"]
    panels = [[shown(panel) for panel in grid["panelBankSectionConfig"]["panels"]] for grid in grids(spec)]
    assert workspace == dict(zip(headings, panels, strict=True))
    assert list(workspace) == ["Memory", "Throughput", "Sparsity", "Quality", "Losses"]
    assert [panel for part in workspace.values() for panel in part] == PANELS
    assert len({panel.title for panel in PANELS}) == len(PANELS)
    for part in sections:  # no panel on a second page
        flow = part["flowConfig"]
        assert part["isOpen"] and len(part["panels"]) <= flow["columnsPerPage"] * flow["rowsPerPage"]
    said = json.dumps(blocks)
    assert all(section.text in said for section in dashboards.SECTIONS)


def test_runs_are_grouped_by_model_and_head_wherever_they_are_shown(spec, logged):
    section = spec["workspace"]["spec"]["section"]
    assert [runset["grouping"] for runset in section["runSets"]] == [GROUPING]
    parts = section["panelBankConfig"]["sections"]
    assert all(part["localPanelSettings"]["useRunsTableGroupingInPanels"] for part in parts)
    for grid in grids(spec):
        assert [runset["grouping"] for runset in grid["runSets"]] == [GROUPING]
    columns = section["runSets"][0]["runFeed"]["columnPinned"]
    assert columns == grids(spec)[0]["runSets"][0]["runFeed"]["columnPinned"] | {"run:displayName": True}
    assert "config:head.value.name" in columns and "config:seed.value" in columns and "summary:test/ndcg@10" in columns
    config = OmegaConf.create(logged.config)
    found = {key: OmegaConf.select(config, key) for key in dashboards.CONFIG_COLUMNS}
    assert found == {"model.name_or_path": "tiny", "head.name": "auto", "batch.size": 4, "seed": 42}


def test_every_metric_of_the_panels_is_one_that_runs_log(logged):
    assert dashboards.STEP in logged.keys
    named = {metric for panel in PANELS for metric in panel.metrics} | set(dashboards.SUMMARY_COLUMNS)
    options = [OmegaConf.load(path) for group in ("loss", "regularizer") for path in (CONF / group).glob("*.yaml")]
    possible = {f"train/loss_{name}" for option in options for name in option.get("losses", {})}
    possible |= {f"train/reg_{name}_{side}" for option in options for name in option for side in ("query", "doc")}
    assert {"train/loss_contrastive", "train/reg_flops_query"} <= possible & logged.keys  # such names are real
    # What needs a GPU stands in the callbacks; the finder's figure is named after the unit of the batch.
    source = "".join(path.read_text() for path in (REPOSITORY / "lightning_modules").rglob("*.py"))
    if 'f"find_batch/{unit}"' in source:
        possible |= {f"find_batch/{unit}" for unit in OmegaConf.load(CONF / "train.yaml").batch}
    unknown = {metric for metric in named - logged.keys - possible if metric not in source}
    assert unknown == set()
    assert len(named & logged.keys) > 15


def test_whole_numbers_of_the_summary_reach_wandb(logged):
    assert "counted/whole" in logged.keys  # as find_batch/size is


class Server:
    """What wandb keeps: a list of views, saved and found by the library's own requests."""

    app_url = "https://wandb.example"

    def __init__(self) -> None:
        self.views: list[dict[str, Any]] = []
        self.saved: list[dict[str, Any]] = []

    def execute_graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        if "mutation" not in query:
            found = [view for view in self.views if view["name"] == variables["viewName"]]
            return {"project": {"allViews": {"edges": [{"node": view} for view in found]}}}
        view = {key: variables[key] for key in ("name", "displayName", "description", "spec", "type")}
        view["id"] = variables.get("id") or f"view{len(self.views)}"
        view["project"] = {"id": "p", "name": variables["projectName"], "entityName": variables["entityName"]}
        self.saved.append(variables)
        self.views = [known for known in self.views if known["id"] != view["id"]] + [view]
        return {"upsertView": {"view": view, "inserted": True}}

    def reports(self, path: str) -> list[SimpleNamespace]:
        if path != "me/runs":
            raise ValueError(f"Project {path} does not exist")
        views = [view for view in self.views if view["type"] == "runs"]
        names = {"display_name": "displayName", "description": "description"}
        return [SimpleNamespace(id=view["id"], **{k: view[v] for k, v in names.items()}) for view in views]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    """A server behind ``wandb.Api``, and a key for it."""
    server = Server()
    projects = [SimpleNamespace(name="runs")]
    api = SimpleNamespace(_service_api=server, reports=server.reports, projects=lambda entity: projects)
    monkeypatch.setattr(wandb, "Api", lambda timeout=None: api)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", "online")
    return server


def test_saving_sends_each_specification_once_and_a_second_call_updates(server, spec, capsys):
    assert dashboards.main(["me/runs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "workspace created: https://wandb.example/me/runs?nw=sparton"
    assert lines[1].startswith("report created: https://wandb.example/me/runs/reports/Sparton--view1")
    assert [view["type"] for view in server.saved] == ["project-view", "runs"]
    for view, expected in zip(server.saved, (spec["workspace"], spec["report"]), strict=True):
        assert (view["entityName"], view["projectName"], view["displayName"]) == ("me", "runs", "Sparton")
        assert without_ids(json.loads(view["spec"])) == without_ids(expected["spec"])

    assert dashboards.main(["me/runs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["workspace updated", "report updated"]
    assert len(server.saved) == 4 and sorted(view["id"] for view in server.views) == ["view0", "view1"]


def test_what_others_saved_in_the_project_stays(server):
    for kind, name in (("project-view", "nw-other-v"), ("runs", "theirs")):
        shared = {"name": name, "displayName": "Sparton", "description": "", "spec": "{}", "type": kind}
        server.execute_graphql("mutation", shared | {"projectName": "runs", "entityName": "me"})
    before = list(server.views)
    assert dashboards.main(["me/runs"]) == 0
    assert server.views[:2] == before and len(server.views) == 4


def refuse(*arguments: Any, **keywords: Any) -> None:
    raise AssertionError("asked the server")


def test_print_asks_nobody(spec, monkeypatch, capsys):
    monkeypatch.setattr(wandb, "Api", refuse)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert dashboards.main(["me/runs", "--print"]) == 0
    assert without_ids(json.loads(capsys.readouterr().out)) == without_ids(spec)


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"WANDB_API_KEY": ""}, "set WANDB_API_KEY"),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, "WANDB_MODE is offline"),
    ],
)
def test_without_a_key_or_offline_it_is_one_line_and_no_question(environ, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(wandb, "Api", refuse)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert dashboards.main(["me/runs"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and said in err and "--print" in err


def test_what_wandb_answers_is_one_line(server, monkeypatch, capsys):
    assert dashboards.main(["me/nowhere"]) == 1
    line = capsys.readouterr().err
    assert line.startswith("dashboards: me/nowhere: wandb says: Project me/nowhere does not exist;")
    assert line.count("\n") == 1 and server.saved == []

    def unreachable(timeout: int) -> None:
        raise wandb.errors.CommError("no\nanswer")

    monkeypatch.setattr(wandb, "Api", unreachable)
    assert dashboards.main(["me/runs"]) == 1
    assert capsys.readouterr().err == (
        "dashboards: me/runs: wandb says: no answer; check name, key and network, or use --print\n"
    )


def test_a_workspace_that_can_not_be_read_is_not_doubled(server, capsys):
    assert dashboards.main(["me/runs"]) == 0
    server.views[0]["spec"] = json.dumps({"version": 7})
    before = list(server.views)
    assert dashboards.main(["me/runs"]) == 1
    assert "please upgrade" in capsys.readouterr().err and server.views == before


@pytest.mark.parametrize("project", ["runs", "me/", "/runs", "a/b/c", "me/ru?ns"])
def test_a_wrong_project(project, capsys):
    with pytest.raises(SystemExit) as stopped:
        dashboards.main([project])
    assert stopped.value.code == 2
    assert f"expected ENTITY/PROJECT, got {project!r}" in capsys.readouterr().err


def test_without_the_extra(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert dashboards.main(["me/runs"]) == 1
    assert capsys.readouterr().err.endswith("pip install -c constraints.txt -e '.[dashboards]'\n")


def test_the_readme_names_the_command():
    assert "python -m reporting.dashboards ENTITY/PROJECT" in (Path(REPOSITORY) / "README.md").read_text()
