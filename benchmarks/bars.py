"""What the head must reach on one H200, and whether a run of bench_head.py did.  python -m benchmarks.bars CSV..."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.table import Row, number, read, told

QUERY = "forward/1x32/250002"  # encoded, so that it has no gradients
GRADIENTS = ("error_hidden", "error_weight", "error_bias")
Table = dict[tuple[str, str], Row]


@dataclass(frozen=True)
class Bar:
    """One line: what is measured in a case, and the least or the most it may be."""

    case: str
    what: str
    value: Callable[[Table, str], float]
    bar: float
    at_most: bool = False

    def met(self, measured: float) -> bool:
        """NaN (not measured) never is."""
        return measured <= self.bar if self.at_most else measured >= self.bar


def of(column: str, impl: str = "sparton") -> Callable[[Table, str], float]:
    """A column of an implementation, the fused head unless told."""
    return lambda table, case: number(table.get((case, impl)), column)


def times_better(impl: str, column: str, ours: str = "sparton") -> Callable[[Table, str], float]:
    """How many times an implementation's figure is the fused head's."""
    return lambda table, case: _ratio(of(column, impl)(table, case), of(column, ours)(table, case))


def memory_over_needed(table: Table, case: str) -> float:
    """Peak memory over output + positions + gradients + one packed copy of hidden."""
    return _ratio(of("peak_memory_mib")(table, case), of("needed_memory_mib")(table, case))


def error_over_naive(*columns: str) -> Callable[[Table, str], float]:
    """The largest ratio of the fused head's error to the naive one's, over the output and the gradients."""
    return lambda table, case: _largest(
        [_ratio(of(column)(table, case), of(f"naive_{column}")(table, case)) for column in columns]
    )


def worst_gradient_error(table: Table, case: str) -> float:
    """The largest relative error of a gradient."""
    return _largest([of(column)(table, case) for column in GRADIENTS])


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan


def _largest(values: list[float]) -> float:
    # max() depends on the order where there is a NaN, which means: not measured.
    return math.nan if any(math.isnan(value) for value in values) else max(values)


def _bars() -> list[Bar]:
    shares = {
        "32x512/250002": 0.92, "32x512/30522": 0.92, "64x128/250002": 0.90, "32x100-512/250002": 0.85,
        "512x32/30522": 0.80, "512x8-32/30522": 0.50,
    }  # fmt: skip
    bars = [
        Bar(f"forward/{name}", "rate / ceiling", of("forward_share_of_ceiling"), bar) for name, bar in shares.items()
    ]
    bars += [
        Bar(f"forward/32x512/{v}", "torch.matmul / sparton", times_better("matmul", "forward_ms"), 1.0)
        for v in (250_002, 30_522)
    ]
    bars.append(Bar(QUERY, "forward, ms", of("forward_ms"), 0.13, at_most=True))
    backward = {
        "32x512/250002/50.0%": 2.0, "32x512/250002/2.0%": 0.35, "32x512/250002/0.1%": 0.22,
        "32x512/250002/50.0%/skewed": 2.8, "64x128/250002/50.0%": 3.8, "32x512/30522/50.0%": 0.40,
    }  # fmt: skip
    bars += [
        Bar(f"backward/{name}", "backward, ms", of("backward_ms"), bar, at_most=True) for name, bar in backward.items()
    ]
    steps = {
        "32x512/250002/2.0%": (16, 7.5), "64x128/250002/50.0%": (8.5, 3.7), "32x512/30522/50.0%": (11, 4.5),
    }  # fmt: skip
    for name, (naive, compiled) in steps.items():
        case = f"step/{name}"
        bars += [
            Bar(case, "naive / sparton, time", times_better("naive", "step_ms"), naive),
            Bar(case, "compiled / sparton, time", times_better("compiled", "step_ms"), compiled),
            Bar(case, "memory / needed", memory_over_needed, 1.3, at_most=True),
        ]
        if "/250002/" in name:
            bars.append(Bar(case, "naive / sparton, memory", times_better("naive", "peak_memory_mib"), 25))
    for case in dict.fromkeys(bar.case for bar in bars):
        columns = ("error_output",) if case == QUERY else ("error_output", *GRADIENTS)
        bars.append(Bar(case, "worst error / naive's", error_over_naive(*columns), 1.0, at_most=True))
        if case.startswith("step/"):
            bars.append(Bar(case, "worst gradient error", worst_gradient_error, 5e-3, at_most=True))
    return bars


BARS = _bars()


def report(rows: list[Row]) -> tuple[list[str], bool]:
    """A line for each bar, and whether all of them are met."""
    table = {(row["case"], row["impl"]): row for row in rows}
    lines, met = [], 0
    for bar in BARS:
        measured = bar.value(table, bar.case)
        met += bar.met(measured)
        verdict = "met" if bar.met(measured) else _why_not(table, bar, measured)
        sign = "<=" if bar.at_most else ">="
        figure = "-" if math.isnan(measured) else f"{measured:.4g}"
        lines.append(f"{bar.case:36} {bar.what:26} {figure:>9} {sign} {bar.bar:<6g} {verdict}")
    return [*lines, *_padded_calls(table), f"{met} of {len(BARS)} bars met"], met == len(BARS)


def _padded_calls(table: Table) -> list[str]:
    """A step of the fused head on the padded batch that naive and compiled get: told, without a bar."""
    lines, ours = [], "sparton_padded"
    for case in (case for case, impl in table if impl == ours and case.startswith("step/")):
        faster = ", ".join(
            f"{impl} {times_better(impl, 'step_ms', ours)(table, case):.3g}" for impl in ("naive", "compiled")
        )
        lines.append(f"{case:36} padded call: {of('step_ms', ours)(table, case):.4g} ms; times faster than {faster}")
    return lines


def _why_not(table: Table, bar: Bar, measured: float) -> str:
    if not math.isnan(measured):
        return "MISSED"
    broken = [
        f"{impl}: {row['status']}" for (case, impl), row in table.items() if case == bar.case and row["status"] != "ok"
    ]
    return "; ".join(["not measured", *broken])


def main(argv: list[str] | None = None) -> int:
    """Prints the bars; exit status 0 only if all are met."""
    paths = [Path(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    if not paths:
        print("usage: python -m benchmarks.bars CSV...", file=sys.stderr)
        return 2
    try:
        rows = read(paths)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    lines, good = report(rows)
    print(told(rows, "device", "torch_version", "triton_version", "commit"))
    print("\n".join(lines))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
