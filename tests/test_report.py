"""report.py: ratios against numbers computed by hand, what is never compared, failures in words, wrong inputs."""

from __future__ import annotations

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("matplotlib")

import report
from reporting import settings
from reporting.build import build
from reporting.document import Column, Picture, Settings, Table, ratio
from reporting.provenance import commands
from reporting.runs import Run, hide_paths, read_runs, unique
from reporting.style import LOOKS
from reporting.wandb_source import read_project
from tests.data_helpers import ROOT, write_collection
from tests.report_helpers import speed, write_run, write_study
from tests.test_train import SMALL, command


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def built(study):
    return build(*read_runs([study]))


def blocks(page, kind):
    return [block for section in page.sections for block in section.blocks if isinstance(block, kind)]


def table(page, start):
    """The rows of the table whose caption begins so, as dictionaries of what readers see."""
    found = next(block for block in blocks(page, Table) if block.caption.startswith(start))
    titles = [column.title for column in found.columns]
    return [dict(zip(titles, row, strict=True)) for row in found.cells()]


def test_largest_batch(built):
    rows = table(built, "Largest batch")
    assert [(row["head"], row["largest batch, queries"], row["÷ naive"]) for row in rows] == [
        ("naive (padded)", "10", "1.00×"), ("sparton (varlen)", "410", "41.00×"),
    ]  # fmt: skip
    assert [row["limit, GiB"] for row in rows] == ["79.9", "79.5"]  # what each found free is no setting
    assert built.findings[0] == "sparton (varlen) fits 41.0× the batch of naive (padded): 410 and 10 queries."
    assert "8.1× the throughput of naive (padded): 810 and 100 samples/s" in built.findings[1]


def test_throughput_and_memory_at_the_same_batch(built):
    rows = table(built, "At the same batch")
    rows = [row for row in rows if (row["longest document"], row["vocabulary"]) == ("512", "250,002")]
    seen = {(row["head"], row["batch"]): row for row in rows}
    fused, naive = seen["sparton (varlen)", "16"], seen["naive (padded)", "16"]
    assert [float(row["samples/s"]) for row in (naive, fused)] == [100, 500] and fused["÷ naive"] == "5.00×"
    assert [float(row["allocated, GiB"]) for row in (naive, fused)] == [16, 3.2] and fused["less memory"] == "5.00×"
    assert seen["naive (padded)", "32"]["step, ms"] == "out of memory"
    assert seen["sparton (varlen)", "32"]["÷ naive"] == "–"  # nothing to set it against


def test_parts_of_a_step_and_the_warm_up(built):
    row = table(built, "Parts of a step, each head at its own largest batch")[0]
    assert (float(row["step, ms"]), float(row["head, ms"]), row["head, % of step"]) == (100, 30, "30")
    assert table(built, "Warm-up")[0]["whole warm-up, s"] == "4"


def test_quality_over_seeds(built):
    naive, fused = table(built, "Quality on the test split")
    # 0.82, 0.84, 0.86 against 0.01 more each: a deviation of 0.02 on both sides allows 0.04
    assert (naive["nDCG@10"], naive["sd"]) == ("0.840", "0.0200")
    assert (fused["− naive"], fused["allowed"]) == ("+0.0100", "0.0400")
    assert fused["verdict"] == "equal" and "BM25" in naive
    assert any("over 3 seeds is equal within the spread of the seeds (+0.0100" in line for line in built.findings)
    assert [row["language"] for row in table(built, "nDCG@10 by language")] == ["de", "de", "en", "en"]


def test_quality_is_compared_over_the_seeds_that_both_have(tmp_path):
    for head, seeds in (("naive", (1, 2)), ("sparton", (1, 2, 3))):
        for seed in seeds:
            known = {"test/ndcg@10": 0.8 + 0.01 * seed}
            real = {"data": {"_target_": "BeirDataModule", "path": "xquad"}}
            write_run(tmp_path / f"{head}{seed}", head, known, changes=real, seed=seed)
    (line,) = build(*read_runs([tmp_path])).findings
    assert "over 2 seeds is equal" in line and "(+0.0000" in line


def test_runs_of_one_head_and_seed_count_as_their_mean(tmp_path):
    real = {"data": {"_target_": "BeirDataModule", "path": "xquad"}}
    for name, head, seed, quality in (
        ("a", "naive", 1, 0.80), ("b", "naive", 2, 0.82), ("c", "sparton", 1, 0.70), ("d", "sparton", 1, 0.90),
        ("e", "sparton", 2, 0.82),
    ):  # fmt: skip
        write_run(tmp_path / name, head, {"test/ndcg@10": quality}, changes=real, seed=seed)
    naive, fused = table(build(*read_runs([tmp_path])), "Quality on the test split")
    assert (naive["nDCG@10"], fused["nDCG@10"]) == ("0.810", "0.810")
    assert (fused["seeds"], fused["− naive"]) == ("2", "+0.0000")


def test_every_section_and_figure_is_there(built):
    assert [section.title for section in built.sections] == [
        "Largest batch", "Throughput and memory", "Against batch size", "Against sequence length", "Against vocabulary",
        "Parts of a step", "Warm-up and compilation", "Quality of the heads", "Quality against sparsity", "Loss curves",
        "What failed, and why", "Machine, versions and commands", "All runs",
    ]  # fmt: skip
    pictures = {picture.name: picture for picture in blocks(built, Picture)}
    assert pictures.keys() == {
        "largest_batch", "batch", "tries", "length", "vocabulary", "step_largest", "step_same", "languages", "sparsity",
        "losses",
    }  # fmt: skip
    assert "sparton (varlen) from 500 at 8 to 500 at 32" in pictures["batch"].alt
    assert "naive (padded) out of memory at 32" in pictures["batch"].alt
    assert "from 3 to 1.5" in pictures["losses"].alt


def test_failures_are_told_apart_in_words(built):
    rows = {row["run"]: row for row in table(built, "4 of 25 runs did not finish")}
    assert rows["batch/naive32"]["what happened"].startswith("ran out of memory")
    assert rows["batch/naive32"]["error"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 7.00 GiB"
    assert rows["bad/typo"]["error"] == "optimizer.lr must be positive, got -1"
    assert "Ctrl-C" in rows["bad/stopped"]["what happened"] and "killed" in rows["bad/killed"]["what happened"]


def test_settings_stand_beside_the_figures(built):
    assert "longest query 64" in built.settings and "checkpointing layer by layer" in built.settings
    assert "precision bf16-mixed" in built.settings and "AdamW, lr 0.001, decay 0.01" in built.settings


@pytest.mark.parametrize(
    "other",
    [
        {"summary": {"device": "another card"}}, {"summary": {"alloc_conf": "expandable_segments:True"}},
        {"changes": {"optimizer.lr": 2e-3}}, {"changes": {"batch.size": 9}},
    ],  # fmt: skip
)
def test_what_differs_is_never_set_against_each_other(tmp_path, other):
    write_run(tmp_path / "naive", "naive", speed(8, 100, 100))
    summary = speed(8, 900, 100) | other.get("summary", {})
    write_run(tmp_path / "sparton", "sparton", summary, changes=other.get("changes"))
    page = build(*read_runs([tmp_path]))
    assert page.findings == []
    assert [row.get("÷ naive") for row in table(page, "At the same batch")] == ["1.00×", "–"]


def test_what_some_runs_have_is_not_said_of_all(tmp_path):
    for name, options in (("a", None), ("b", "expandable_segments:True")):
        write_run(tmp_path / name, "naive", speed(8, 100, 100) | {"alloc_conf": options, "device": "card"})
    assert "allocator" not in build(*read_runs([tmp_path])).settings
    assert "allocator expandable_segments:True" in build(*read_runs([tmp_path / "b"])).settings


def test_seeds_are_averaged_and_commits_named(tmp_path):
    for seed, samples in ((1, 100), (2, 300)):
        write_run(tmp_path / f"n{seed}", "naive", speed(8, samples, 100), seed=seed)
        write_run(tmp_path / f"s{seed}", "sparton", speed(8, 2 * samples, 100) | {"commit": f"c{seed}"}, seed=seed)
    page = build(*read_runs([tmp_path]))
    rows = table(page, "At the same batch")
    assert [(row["samples/s"], row["÷ naive"]) for row in rows] == [("200", "1.00×"), ("400", "2.00×")]
    assert [row["runs"] for row in rows] == ["2", "2"]
    assert blocks(page, Settings)[0].note == "Runs of several commits are compared here: abc, c1, c2."


def test_the_label_says_how_the_backbone_ran_only_where_that_differs():
    def run(name, head, packed):
        return Run(name, None, {}, {}, {"head": head, "packed": packed, "status": "finished"})

    same = [run("a", "naive", "padded"), run("b", "sparton", "padded")]
    assert settings.labels(same) == {"a": "naive", "b": "sparton"}
    both = [*same, run("c", "sparton", "varlen"), Run("d", None, {}, {"head.name": "naive"}, {"status": "failed"})]
    told = Run("e", None, {}, {"head.name": "naive", "model.packed": False}, {"status": "failed"})
    assert settings.labels([*both, run("f", "naive", "varlen"), told])["e"] == "naive (padded)"
    named = settings.labels(both)
    assert named == {"a": "naive (padded)", "b": "sparton (padded)", "c": "sparton (varlen)", "d": "naive (padded)"}
    assert settings.in_order(named.values()) == ["naive (padded)", "sparton (padded)", "sparton (varlen)"]
    assert settings.baseline(["sparton", "naive (varlen)", "naive (padded)"]) == "naive (padded)"


def test_commands_join_sweeps_and_hide_local_paths(tmp_path):
    for place, (head, seed) in enumerate([("naive", 1), ("naive", 2), ("tiled", 1), ("tiled", 2)]):
        said = [f"head={head}", "data.path=/home/me/data", f"seed={seed}", "data.lengths=/home/me/l.csv"]
        write_run(tmp_path / f"full/{place}", head, overrides=said)
    for place, head in enumerate(("naive", "tiled")):  # no product: only the diagonal
        write_run(tmp_path / f"part/{place}", head, overrides=[f"head={head}", f"seed={place}"])
    write_run(tmp_path / "single/0", "naive", overrides=["~callbacks.memory", "experiment=[a,b]", "head=naive"])
    assert commands(read_runs([tmp_path])[0]) == [
        "python train.py -m head=naive,tiled seed=1,2 data.lengths=…/l.csv",
        "python train.py head=naive seed=0", "python train.py head=tiled seed=1",
        "python train.py '~callbacks.memory' 'experiment=[a,b]' head=naive",
    ]  # fmt: skip
    assert [run.name for run in unique([*read_runs([tmp_path])[0][:1]] * 2)] == ["full/0", "full/0 #2"]
    assert hide_paths("no /home/me/x y.csv, see https://a.b/c/d 1/2") == "no …/x y.csv, see https://a.b/c/d 1/2"


def test_numbers_and_looks():
    columns = [Column("x"), Column("r", suffix="×"), Column("none")]
    shown = Table("", columns, [[1234.5, 0.5, None], [0.0004, 41.26, None]])
    assert [column.title for column in shown.columns] == ["x", "r"]  # an empty column is left out
    assert shown.cells() == [["1,234", "0.5×"], ["0.0004", "41.3×"]]
    assert (ratio(39.96), ratio(0.5), ratio(8.06)) == ("40.0×", "0.5×", "8.1×")
    for part in ("colour", "marker", "hatch"):
        assert len({getattr(look, part) for look in LOOKS.values()}) == len(LOOKS)
    assert len({str(look.dashes) for look in LOOKS.values()}) == len(LOOKS)


def test_what_runs_say_is_text_and_never_markup(tmp_path):
    evil = "<script>alert(1)</script> | **x** `y` [z](w)"
    write_run(tmp_path / "a", "naive", {"status": "failed", "error": evil})
    assert report.main([str(tmp_path)]) == 0
    page, markdown = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    assert "&lt;script&gt;alert(1)" in page and "<script" not in page and "<script" not in markdown
    assert "\\| \\*\\*x\\*\\* \\`y\\` \\[z\\](w)" in markdown
    assert not (tmp_path / "figures").exists()  # nothing to draw


def test_a_corrupt_file_is_said_and_skipped(tmp_path, capsys):
    write_run(tmp_path / "good", "naive", {})
    for name, text in (("cut", '{"status": '), ("list", "[]"), ("nan", '{"status": "finished", "perf/step_ms": "x"}')):
        write_run(tmp_path / name, "naive", text)
    (write_run(tmp_path / "yaml", "naive", {}) / ".hydra/config.yaml").write_text("a: [")
    (write_run(tmp_path / "said", "naive", {}) / ".hydra/overrides.yaml").write_text("- {")
    write_run(tmp_path / "csv", "naive", {})
    (tmp_path / "csv/metrics.csv").write_text("step,train/loss\none,2\n")
    assert report.main([str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert [line.split(":")[0] for line in said.err.splitlines()] == ["csv", "cut", "list", "said", "yaml"]
    assert "expected JSON" in said.err and "2 runs, 2 finished" in said.out
    assert "cut: skipped, summary.json: expected JSON" in (tmp_path / "report.md").read_text()


def test_a_cut_off_file_of_losses_and_a_run_without_its_configuration(tmp_path):
    (write_run(tmp_path / "cut", "naive", {}) / "metrics.csv").write_text("train/loss,step\n2.0,0\n1.5")
    (write_run(tmp_path / "other", "naive", {}) / "metrics.csv").write_text("train/loss,time\n2.0,0\n")
    (write_run(tmp_path / "bare", "naive", speed(8, 100, 100)) / ".hydra/config.yaml").unlink()
    runs, problems = read_runs([tmp_path])
    assert {run.name: run.losses for run in runs} == {"bare": {}, "cut": {0: 2.0}, "other": {}} and not problems
    page = build([run for run in runs if run.name == "bare"])
    assert "batch 8:" in next(picture.alt for picture in blocks(page, Picture) if picture.name == "step_same")


def test_pairs_and_tokens_never_share_a_table(tmp_path):
    for head in ("naive", "sparton"):
        for unit, asked in (("size", {}), ("tokens", {"batch.tokens": 500})):
            found = speed(10, 100, 100) | {f"find_batch/{unit}": 10 if unit == "size" else 4000}
            write_run(tmp_path / f"{head}_{unit}", head, found, find_batch=True, changes=asked)
    page = build(*read_runs([tmp_path]))
    titles = [column.title for block in blocks(page, Table)[:2] for column in block.columns]
    assert [title for title in titles if "batch" in title] == ["largest batch, queries", "largest batch, tokens"]
    names = [picture.name for picture in blocks(page, Picture)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["{tmp}/absent"], "error: FOLDER: expected a folder of runs of train.py, got {tmp}/absent"),
        (["{tmp}"], "error: FOLDER: expected runs of train.py, found none that can be read below {tmp}"),
        (["wandb:nobody", "--out", "{tmp}"], "error: wandb:nobody: expected wandb:ENTITY/PROJECT"),
        (["wandb:a/b", "--out", "{tmp}"], "error: wandb:a/b: could not be read .no key: set WANDB_API_KEY"),
    ],
)
def test_wrong_sources_are_one_line(tmp_path, monkeypatch, sources, message):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(SystemExit) as caught:
        report.main([source.format(tmp=tmp_path) for source in sources])
    assert re.match(message.format(tmp=tmp_path), str(caught.value)) and "\n" not in str(caught.value)


def test_a_wandb_project_needs_a_place_for_the_report(capsys):
    with pytest.raises(SystemExit):
        report.main(["wandb:a/b"])
    assert "--out: expected a folder for the report" in capsys.readouterr().err


class FakeApi:
    """What wandb.Api answers, lazily as it does."""

    def __init__(self, *runs):
        self.known = runs

    def runs(self, path, filters):
        if path != "me/heads":
            raise ValueError(f"Could not find project {path}\nor no access")
        return (run for run in self.known if filters.get("group") in (None, run.group))


def wandb_run(name, head, samples, state="finished", group="g"):
    config = {"seed": 1, "head": {"name": head}, "batch": {"size": 8}, "model": {"name_or_path": "xlmr"}, "_wandb": {}}
    history = [{"trainer/global_step": step, "train/loss": 2.0 - step} for step in range(2)]
    return SimpleNamespace(
        name=name, config=config, state=state, group=group, created_at="2026-01-02T00:00:00Z",
        summary=speed(8, samples, 99), scan_history=lambda keys: history,
        metadata={"gpu": "a card", "python": "CPython 3.12", "git": {"commit": "abc"}},
    )  # fmt: skip


def test_a_wandb_project():
    api = FakeApi(
        wandb_run("one", "naive", 100), wandb_run("two", "sparton", 250), wandb_run("three", "tiled", 1, "crashed", "h")
    )
    runs = read_project("me/heads", api)
    assert [run.status for run in runs] == ["finished", "finished", "failed"] and runs[0].losses == {0: 2.0, 1: 1.0}
    rows = table(build(runs), "At the same batch")
    assert [(row["head"], row["÷ naive"]) for row in rows] == [("naive", "1.00×"), ("tiled", "–"), ("sparton", "2.50×")]
    assert [run.name for run in read_project("me/heads/g", api)] == ["one", "two"]
    with pytest.raises(ValueError, match=r"wandb:me/typo: could not be read \(Could not find project me/typo or"):
        read_project("me/typo", api)
    with pytest.raises(ValueError, match="found none"):
        read_project("me/heads/other", api)


def test_without_matplotlib_one_line_names_the_extra(study, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for name in ("reporting.style", "reporting.pages"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(SystemExit, match=r"report.py needs matplotlib .*\[report\]"):
        report.main([str(study)])


def test_a_sweep_with_a_failing_run_becomes_a_report(tmp_path):
    """The whole way: real runs, one of which fails, and the command."""
    folder, sweep = write_collection(tmp_path / "small"), tmp_path / "sweep"
    line, environ = command(
        "-m", *SMALL, "model=tiny", "head=naive,tiled", "optimizer.lr=1e-3,-1", "data=beir", f"data.path={folder}",
        "trainer.max_steps=8", "trainer.val_check_interval=8", "logger=csv", "test.untrained=false", "export=false",
        f"hydra.sweep.dir={sweep}",
    )  # fmt: skip
    done = subprocess.run(line, env=environ, text=True, capture_output=True, timeout=250, check=False)
    assert done.returncode == 1, done.stderr
    made = [sys.executable, str(ROOT / "report.py"), str(sweep)]
    done = subprocess.run(made, env=environ, text=True, capture_output=True, timeout=250, check=False)
    assert (done.returncode, done.stderr) == (0, "") and "4 runs, 2 finished" in done.stdout
    markdown = (sweep / "report.md").read_text()
    assert "2 of 4 runs did not finish" in markdown and "optimizer.lr must be positive, got -1" in markdown
    assert "head=naive,tiled optimizer.lr=0.001,-1" in markdown and str(tmp_path) not in markdown
    assert "the throughput of naive" in markdown and "## Loss curves" in markdown
    assert (sweep / "report.html").stat().st_size > 50_000 and (sweep / "figures/losses.png").exists()
    assert str(tmp_path) not in (sweep / "report.html").read_text()
