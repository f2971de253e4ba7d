"""The benchmark of the head: tiny runs end to end, bars on made-up rows, figures, no figures of a red head."""

from __future__ import annotations

import csv
import math
import sys

import pytest
import torch

from benchmarks import bars, bench_head, gate
from benchmarks.cases import CASES, SKEWED_TOKENS, build, sweep_cases
from benchmarks.meter import Meter, errors, parse_telemetry
from benchmarks.table import number, read

BY_NAME = {case.name: case for case in CASES}


@pytest.fixture
def green(monkeypatch):
    monkeypatch.setattr(bench_head, "require_green_tests", lambda: None)


def write(path, rows):
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return path


def run(tmp_path, *arguments, status=0):
    """Rows of a run at a tiny size, also where there is a GPU."""
    path = tmp_path / "new" / "out.csv"
    assert bench_head.main(["--out", str(path), *arguments]) == status
    return read([path])


@pytest.fixture
def tiny(monkeypatch, green):
    monkeypatch.setattr(bench_head, "chosen", lambda arguments, _, chosen=bench_head.chosen: chosen(arguments, False))
    monkeypatch.setattr(bench_head, "Meter", lambda device: Meter(device, warm_s=0.01, repeat_s=0.01))


def test_end_to_end(tiny, tmp_path):
    cases = "forward/512x8-32|forward/32x512/30522|backward/32x512/30522|forward/1x32"
    impls = "naive,naive_max_first,tiled,sparton,sparton_padded,matmul"
    rows = run(tmp_path, "--cases", cases, "--impls", impls)
    assert len(rows) == 5 + 5 + 4 + 4
    assert {row["status"] for row in rows} == {"ok"}
    for row in rows:
        assert row["commit"] and row["torch_version"] and row["date"] and row["case"].startswith("tiny/")
        assert row["device"].startswith("cpu") == (not torch.cuda.is_available())
        rate = 2 * number(row, "tokens") * number(row, "vocab_size") * number(row, "hidden_size")
        assert number(row, "forward_tflops_per_s") == pytest.approx(rate / number(row, "forward_ms") / 1e9, rel=1e-3)
        assert number(row, "forward_ms_p20") <= number(row, "forward_ms") <= number(row, "forward_ms_p80")
        backward = row["impl"] != "matmul" and "1x32" not in row["case"]
        assert (number(row, "backward_ms") > 0) == (number(row, "step_ms") > 0) == backward
        if row["impl"] != "matmul":
            assert number(row, "error_output") < 2e-2
            assert not backward or all(number(row, f"error_{name}") < 2e-2 for name in ("hidden", "weight", "bias"))
        if row["impl"] == "naive":
            for name in bench_head.ERRORS:
                assert row[f"naive_{name}"] == row[name]  # also where that is nothing
        assert (number(row, "naive_error_bias") > 0) == ("1x32" not in row["case"])


def test_quick_runs_what_the_bars_need():
    parse = bench_head._parse
    pairs = bench_head.chosen(parse(["--out", "x", "--quick"])[1], True)
    rows = {(case.name, impl) for case, impls in pairs for impl in impls}
    assert {(bar.case, "sparton") for bar in bars.BARS} | {
        (bar.case, impl)
        for bar in bars.BARS
        for impl in ("naive", "compiled", "sparton_padded")
        if bar.case.startswith("step/")
    } | {(f"forward/32x512/{v}", "matmul") for v in (250_002, 30_522)} == rows
    everything = bench_head.chosen(parse(["--out", "x"])[1], True)
    assert rows < {(case.name, impl) for case, impls in everything for impl in impls}
    sweep = bench_head.chosen(parse(["--out", "x", "--sweep", "--cases", "/32x256/", "--impls", "sparton"])[1], True)
    assert [case.name for case, _ in sweep][-1] == "sweep/32x256/119547" and len(sweep) == 4


@pytest.mark.parametrize("name", ["backward/32x512/250002/2.0%", "backward/32x512/250002/50.0%/skewed"])
def test_activity_and_skew_are_what_the_case_says(name):
    case = BY_NAME[name]
    smaller = type(case)(**vars(case) | {"batch": 4, "vocab": 3000, "dim": 64})
    problem = build(smaller, torch.device("cpu"), torch.bfloat16)
    row = bench_head.describe(problem, bench_head.truth(problem))
    assert row["active_share"] == pytest.approx(case.active, rel=0.1)
    share = row["won_by_first_tokens_share"]
    assert share > 0.9 if case.skewed else share == pytest.approx(SKEWED_TOKENS / 512, abs=0.02)
    assert problem.step_bytes == 2 * (3000 * 4 + 2 * 2048 * 64 + 3000 * 64 + 3000) + 3000 * 4 * 2


def test_random_lengths_are_two_thirds_of_the_padding():
    for case in (BY_NAME["step/32x512/250002/2.0%"], BY_NAME["step/64x128/250002/50.0%"], sweep_cases()[0]):
        lengths = bench_head.build(type(case)(**vars(case) | {"vocab": 8, "dim": 4}), torch.device("cpu"),
                                   torch.float32).lengths  # fmt: skip
        assert max(lengths) == case.longest
        assert 0.55 < sum(lengths) / (case.batch * case.longest) < 0.75


def test_a_row_says_what_failed(tiny, tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench_head, "naive_max_first", broken)
    arguments = ["--cases", "step/32x512/30522", "--impls", "naive_max_first,tiled"]
    rows = run(tmp_path, *arguments)
    assert [(row["impl"], row["status"]) for row in rows] == [("naive_max_first", "out of memory"), ("tiled", "ok")]
    assert math.isnan(number(rows[0], "forward_ms"))

    def wrong(*_):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(bench_head, "naive_max_first", wrong)
    rows = run(tmp_path, *arguments, status=1)
    assert [row["status"] for row in rows] == ["failed: RuntimeError: first line", "ok"]
    assert "1 rows failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "nothing like it"], "no case and implementation match"),
        (["--cases", "("], "expected a regular expression"),
        (["--impls", "naive,fast"], "got fast"),
    ],
)
def test_wrong_arguments(arguments, message, green, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        bench_head.main(["--out", str(tmp_path / "out.csv"), *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out.csv").exists()


def test_nothing_is_measured_while_tests_are_red(tmp_path, monkeypatch, capfd):
    test = tmp_path / "tests" / "test_head_made_up.py"
    test.parent.mkdir()
    monkeypatch.setattr(gate, "REPOSITORY", tmp_path)
    monkeypatch.setattr(gate, "STAMP", tmp_path / ".pytest_cache" / "stamp")
    out = tmp_path / "out.csv"
    arguments = ["--out", str(out), "--cases", "forward/1x32", "--impls", "tiled"]

    def refused(message):
        assert bench_head.main(arguments) == 1
        assert message in capfd.readouterr().err
        assert not out.exists() and not gate.STAMP.exists()

    refused("found none")
    test.write_text("def test_it():\n    assert False\n")
    refused("tests are red (pytest exit status")
    test.write_text("def test_it():\n    pass\n")
    gate.require_green_tests()
    assert "1 passed" in capfd.readouterr().out
    gate.require_green_tests()
    assert "were green" in capfd.readouterr().out
    # The stamp is for these contents only.
    test.write_text("def test_it():\n    assert 1 == 2\n")
    with pytest.raises(RuntimeError, match="are red"):
        gate.require_green_tests()


def made_up(better=1.0):
    """Rows that meet each bar exactly at ``better`` = 1 and miss it below."""
    names = dict.fromkeys(bar.case for bar in bars.BARS)
    told = {"status": "ok", "device": "made up", "torch_version": "1", "triton_version": "2", "commit": "c"}
    rows = {(case, impl): {"case": case, "impl": impl} | told for case in names
            for impl in ("naive", "compiled", "sparton", "sparton_padded", "matmul")}  # fmt: skip
    for row in rows.values():
        errors = ("error_output", "error_hidden", "error_weight", "error_bias")
        row |= dict.fromkeys(errors, 4e-3 / better) | {f"naive_{name}": 4e-3 for name in errors}
        row |= {"step_ms": 1.0, "forward_ms": 0.125 / better, "peak_memory_mib": 100.0, "needed_memory_mib": 100.0}
    for bar in bars.BARS:
        own = rows[bar.case, "sparton"]
        if bar.what == "rate / ceiling":
            own["forward_share_of_ceiling"] = bar.bar * better
        elif bar.what == "backward, ms":
            own["backward_ms"] = bar.bar / better
        elif bar.what.endswith("/ sparton, time"):
            rows[bar.case, bar.what.split(" ")[0]]["step_ms"] = bar.bar * better
        elif bar.what == "naive / sparton, memory":
            rows[bar.case, "naive"]["peak_memory_mib"] = 2500 * better
        elif bar.what == "torch.matmul / sparton":
            rows[bar.case, "matmul"]["forward_ms"] = 0.125
        elif bar.what == "memory / needed":
            own["needed_memory_mib"] = 100 / 1.29 * better
    return rows


def test_bars(tmp_path, capsys):
    rows = made_up()
    path = write(tmp_path / "good.csv", list(rows.values()))
    assert bars.main([str(path)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "made up, 1, 2, c" and told[-1] == f"{len(bars.BARS)} of {len(bars.BARS)} bars met"
    padded = [line for line in told if "padded call" in line]
    assert len(padded) == 3 and padded[0].endswith("padded call: 1 ms; times faster than naive 16, compiled 7.5")
    assert len(told) == len(bars.BARS) + 5
    assert bars.main([str(write(tmp_path / "bad.csv", list(made_up(better=0.7).values())))]) == 1
    told = capsys.readouterr().out.splitlines()
    assert told[-1] == f"0 of {len(bars.BARS)} bars met"
    assert all(line.endswith("MISSED") for line in told[1:-1] if "padded call" not in line)


def test_bars_that_were_not_measured(tmp_path, capsys):
    rows = made_up()
    case = "step/64x128/250002/50.0%"
    rows[case, "naive"] |= {"status": "out of memory", "step_ms": "", "peak_memory_mib": ""}
    rows[case, "sparton"] |= {"error_weight": "nan", "naive_error_output": ""}
    del rows["backward/64x128/250002/50.0%", "sparton"]
    assert bars.main([str(write(tmp_path / "some.csv", list(rows.values())))]) == 1
    told = capsys.readouterr().out.splitlines()
    missing = [line for line in told if "not measured" in line]
    assert len(missing) == 6 and sum("naive: out of memory" in line for line in missing) == 4
    assert bars.main([str(tmp_path / "none.csv")]) == 1
    assert "no such file" in capsys.readouterr().err
    assert bars.main([str(write(tmp_path / "other.csv", [{"a": 1}]))]) == 1
    assert "expected a CSV of bench_head.py" in capsys.readouterr().err
    assert bars.main([]) == 2


def figure_rows():
    told = {"status": "ok", "device": "made up", "dtype": "bfloat16"}
    for case in sweep_cases():
        for k, impl in enumerate(case.impls):
            work = case.batch * case.longest * case.vocab * (4 - k)
            row = told | {"case": case.name, "impl": impl, "batch": case.batch, "seqlen": case.longest}
            row |= {"vocab_size": case.vocab, "step_ms": work / 1e8, "peak_memory_mib": work / 1e6}
            if impl == "naive" and case.batch == 256:
                row |= {"status": "out of memory", "step_ms": "", "peak_memory_mib": ""}
            yield row
    for k, case in enumerate(case for case in CASES if case.name.startswith("forward/")):
        for impl in case.impls:
            row = told | {"case": case.name, "impl": impl, "forward_flops": 1e12, "forward_bytes": 1e9 * 4.0 ** (k - 3)}
            row |= {"forward_tflops_per_s": 600 if impl == "sparton" else 200}
            yield row | {"ceiling_before_tflops_per_s": 700, "ceiling_after_tflops_per_s": 690,
                         "copy_before_tb_per_s": 4.2, "copy_after_tb_per_s": ""}  # fmt: skip


def test_plots(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from benchmarks import plot

    path = write(tmp_path / "rows.csv", list(figure_rows()))
    assert plot.main([str(path), "--out", str(tmp_path / "figures")]) == 0
    for name in ("sweep", "roofline"):
        assert (tmp_path / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    nothing = write(tmp_path / "nothing.csv", [{"case": "tiny/a", "impl": "b", "status": "ok", "device": "d"}])
    for file, message in ((nothing, "no row of a case"), (tmp_path / "none.csv", "no such file")):
        with pytest.raises(SystemExit):
            plot.main([str(file), "--out", str(tmp_path)])
        assert message in capsys.readouterr().err


def test_plot_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "benchmarks.plot", raising=False)
    with pytest.raises(SystemExit, match=r"need matplotlib .*\[report\]"):
        import benchmarks.plot  # noqa: F401


def test_telemetry_of_several_lines():
    medians = parse_telemetry("1755, 690.12, 61\n1740, 700.5, 62\n1200, [N/A], 60\n")
    assert medians["sm_clock_mhz"] == 1740 and medians["temperature_c"] == 61
    assert medians["power_w"] == pytest.approx(690.12)
    assert all(math.isnan(value) for value in parse_telemetry("NVIDIA-SMI has failed\n").values())


def test_meter_on_a_cpu():
    meter = Meter(torch.device("cpu"))
    with meter.telemetry() as medians:
        low, middle, high = meter.times(lambda state: state + 1, lambda: 1)
    assert 0 <= low <= middle <= high < 1e3
    assert all(math.isnan(value) for value in (*medians.values(), *meter.ceilings(), meter.peak_memory(list)))
    assert errors([torch.ones(4)], [torch.full((4,), 2.0, dtype=torch.float64)]) == [0.5]
