"""Every head in one run: time, memory, error and the card's ceilings.  python -m benchmarks.bench_head --out OUT.csv"""

from __future__ import annotations

import argparse
import contextlib
import csv
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import sparton
from benchmarks.cases import CASES, IMPLS, SKEWED_TOKENS, Case, Problem, build, sweep_cases
from benchmarks.gate import require_green_tests
from benchmarks.meter import MIB, TELEMETRY, Meter, errors
from lightning_modules.environment import environment

HEADS = {
    "naive": sparton.NaiveHead,
    "compiled": sparton.CompiledHead,
    "tiled": sparton.TiledHead,
    "sparton": sparton.SpartonHead,
    "sparton_padded": sparton.SpartonHead,
}
# All in bfloat16 with bfloat16 parameters. Under autocast the naive heads' ReLU and log1p run in float32, which costs
# their users more than what is measured here.
# Users of these have a padded batch and its mask; the others take packed rows, as the encoder of this project does.
PADDED = ("naive", "naive_max_first", "compiled", "sparton_padded")
TIMES = [f"{part}_ms{suffix}" for part in ("forward", "backward", "step") for suffix in ("_p20", "", "_p80")]
ERRORS = [f"error_{name}" for name in ("output", "hidden", "weight", "bias")]
NAIVE_ERRORS = [f"naive_{name}" for name in ERRORS]  # in every row of a case, so that none stands alone
COLUMNS = [
    "case", "impl", "status", "batch", "seqlen", "tokens", "hidden_size", "vocab_size", "dtype", "active_share",
    "won_by_first_tokens_share", *TIMES, "forward_latency_ms", "forward_flops", "forward_bytes",
    "forward_tflops_per_s", "ceiling_before_tflops_per_s", "ceiling_after_tflops_per_s", "forward_share_of_ceiling",
    "copy_before_tb_per_s", "copy_after_tb_per_s", *TELEMETRY, "peak_memory_mib", "needed_memory_mib", *ERRORS,
    *NAIVE_ERRORS,
]  # fmt: skip
OUT_OF_MEMORY = "out of memory"


def naive_max_first(hidden: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    """The naive head with the maximum before ReLU and log1p, which then touch (B, V) only."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return logits.masked_fill(mask[..., None] == 0, -math.inf).max(dim=1).values.relu().log1p()


def forward_of(impl: str, problem: Problem) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """What computes (B, V) in an implementation, on the layout that its users have, and the leaves of its gradients."""
    decoder = problem.decoder
    hidden = problem.padded if impl in PADDED else problem.packed
    leaves = [hidden, decoder.weight, decoder.bias]
    if impl == "naive_max_first":
        return lambda: naive_max_first(*leaves, problem.mask), leaves
    head = HEADS[impl].from_linear(decoder)
    if impl in PADDED:
        return lambda: head(hidden, problem.mask), leaves
    longest = max(problem.lengths)
    return lambda: head(hidden, cu_seqlens=problem.cu_seqlens, max_seqlen=longest), leaves


def truth(problem: Problem) -> list[Tensor]:
    """Output and gradients in float64, all of the vocabulary: the tiled head, whose float64 the tests hold to 1e-13.

    It needs no (B, S, V) tensor, so that no slice of the vocabulary has to stand for the whole.
    """
    decoder, trains = problem.decoder, problem.case.trains
    leaves = [t.detach().double().requires_grad_(trains) for t in (problem.packed, decoder.weight, decoder.bias)]
    out = sparton.lsr_head(*leaves, cu_seqlens=problem.cu_seqlens, max_seqlen=max(problem.lengths), impl="tiled")
    gradients = torch.autograd.grad(out, leaves, problem.grad.double()) if trains else ()
    return [out.detach(), *gradients]


def step_of(problem: Problem, forward: Callable[[], Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """The output and, where the case trains, the gradients."""
    out = forward()
    return [out, *(torch.autograd.grad(out, leaves, problem.grad) if problem.case.trains else ())]


def errors_of(problem: Problem, impl: str, got: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Relative errors of what :func:`step_of` gives; hidden's gradient on the real rows alone."""
    if problem.case.trains and impl in PADDED:
        got[1] = got[1][problem.mask.bool()]
    return errors(got, expected)


def naive_errors(problem: Problem, expected: list[Tensor] | None) -> dict[str, float]:
    """What the naive head's errors are, from one pass that isn't timed; nothing where it has too little memory."""
    if expected is None:
        return {}
    try:
        got = step_of(problem, *forward_of("naive", problem))
    except torch.OutOfMemoryError:
        return {}
    return dict(zip(NAIVE_ERRORS, errors_of(problem, "naive", got, expected), strict=False))


def describe(problem: Problem, expected: list[Tensor] | None) -> dict[str, object]:
    """The columns that all implementations of a case share."""
    case = problem.case
    row = {
        "case": case.name, "batch": case.batch, "seqlen": max(problem.lengths), "tokens": problem.tokens,
        "hidden_size": case.dim, "vocab_size": case.vocab, "dtype": str(problem.grad.dtype).removeprefix("torch."),
        "forward_flops": problem.forward_flops, "forward_bytes": problem.forward_bytes,
        "needed_memory_mib": problem.step_bytes / MIB,
    }  # fmt: skip
    if expected is None:
        return row
    out, first = expected[0], slice(0, SKEWED_TOKENS)
    with torch.no_grad():
        doubles = (t.double() for t in (problem.padded[:, first], problem.decoder.weight, problem.decoder.bias))
        of_first = sparton.lsr_head(*doubles, problem.mask[:, first], impl="tiled")
    active = out > 0
    won = (active & torch.isclose(of_first, out)).sum() / active.sum().clamp_min(1)
    return row | {"active_share": active.double().mean().item(), "won_by_first_tokens_share": won.item()}


@contextlib.contextmanager
def bracketed(meter: Meter, row: dict[str, object]) -> Iterator[None]:
    """Measures the ceilings right before and right after what is timed inside, and the card's state meanwhile."""
    row["ceiling_before_tflops_per_s"], row["copy_before_tb_per_s"] = meter.ceilings()
    with meter.telemetry() as medians:
        yield
    row["ceiling_after_tflops_per_s"], row["copy_after_tb_per_s"] = meter.ceilings()
    row.update(medians)


def measure(problem: Problem, impl: str, expected: list[Tensor] | None, meter: Meter, row: dict[str, object]) -> None:
    """Fills ``row`` with what one implementation takes; what it got to before it failed stays."""
    forward, leaves = forward_of(impl, problem)
    trains = problem.case.trains

    def backward(out: Tensor, keep: bool = False) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves, problem.grad, retain_graph=keep)

    def step(_: object = None) -> list[Tensor]:
        return step_of(problem, forward, leaves)

    def timed(part: str, *region: Callable) -> None:
        row.update(zip(TIMES[3 * ("forward", "backward", "step").index(part) :], meter.times(*region), strict=False))

    step()  # compiles, outside of what is timed and of what keeps the card warm
    with bracketed(meter, row):
        timed("forward", lambda _: forward())
        if trains:
            if impl == "compiled":  # a compiled graph gives its buffers away, so each pass needs its own
                timed("backward", backward, forward)
            else:
                out = forward()
                timed("backward", lambda _: backward(out, keep=True))
                del out
            timed("step", step)
    row["forward_latency_ms"] = meter.latency(forward)
    row["peak_memory_mib"] = meter.peak_memory(step)
    if expected is not None:
        row.update(zip(ERRORS, errors_of(problem, impl, step(), expected), strict=False))


def measure_matmul(problem: Problem, meter: Meter, row: dict[str, object]) -> None:
    """Times the bare product that writes all logits, with V rounded up to what cuBLAS is fast at."""
    weight = problem.decoder.weight.detach()
    missing = -len(weight) % 64
    aligned = torch.cat([weight, weight[:missing]])
    logits = torch.empty(problem.tokens, len(aligned), dtype=weight.dtype, device=weight.device)
    with torch.no_grad(), bracketed(meter, row):
        row.update(zip(TIMES, meter.times(lambda _: torch.matmul(problem.packed, aligned.T, out=logits)), strict=False))


def measure_row(
    problem: Problem, impl: str, expected: list[Tensor] | None, meter: Meter, shared: dict[str, object]
) -> dict[str, object]:
    """One line of the CSV, also for what fails."""
    row = shared | {"impl": impl, "status": "ok"}
    meter.tidy()
    try:
        if impl == "matmul":
            measure_matmul(problem, meter, row)
        else:
            measure(problem, impl, expected, meter, row)
    except torch.OutOfMemoryError:
        row["status"] = OUT_OF_MEMORY
    except Exception as error:  # one broken implementation must not cost the others their rows
        row["status"] = f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if "ceiling_after_tflops_per_s" in row:
        rate = problem.forward_flops / row["forward_ms"] / 1e9
        ceiling = (row["ceiling_before_tflops_per_s"] + row["ceiling_after_tflops_per_s"]) / 2
        row |= {"forward_tflops_per_s": rate, "forward_share_of_ceiling": rate / ceiling}
    return row


def measure_cases(
    cases: list[tuple[Case, list[str]]], device: torch.device, meter: Meter
) -> Iterator[dict[str, object]]:
    """Yields the rows of each case, in the order of its implementations."""
    for case, impls in cases:
        problem = build(case, device, torch.bfloat16)
        try:
            expected = truth(problem)
        except torch.OutOfMemoryError:
            expected = None
        shared = describe(problem, expected) | naive_errors(problem, expected)
        for impl in impls:
            yield measure_row(problem, impl, expected, meter, shared)
        del problem, expected
        meter.tidy()


def chosen(arguments: argparse.Namespace, on_gpu: bool) -> list[tuple[Case, list[str]]]:
    """The cases and implementations that the command line asks for; each case at a tiny size without a GPU."""
    cases = [case if on_gpu else case.tiny() for case in (sweep_cases() if arguments.sweep else CASES)]
    pairs = []
    for case in cases:
        impls = case.quick if arguments.quick else case.impls
        impls = [impl for impl in impls if arguments.impls is None or impl in arguments.impls]
        if impls and arguments.cases.search(case.name):
            pairs.append((case, impls))
    return pairs


def _parse(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_head", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the CSV to write")
    parser.add_argument("--cases", type=_pattern, default=_pattern(""), metavar="REGEX", help="cases whose name has it")
    parser.add_argument("--impls", type=_impls, metavar="A,B", help=f"some of {','.join(IMPLS)}")
    parser.add_argument("--quick", action="store_true", help="only the cases and implementations that the bars need")
    parser.add_argument("--sweep", action="store_true", help="vary B, S and V for plot.py, instead of the bars' cases")
    return parser, parser.parse_args(argv)


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"expected a regular expression, got {text!r}: {error}") from error


def _impls(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in IMPLS]:
        raise argparse.ArgumentTypeError(f"expected some of {','.join(IMPLS)}, got {','.join(unknown)}")
    return names


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; exit status 1 if a row failed otherwise than for lack of memory."""
    parser, arguments = _parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pairs = chosen(arguments, device.type == "cuda")
    if not pairs:
        names = "\n  ".join(case.name for case in (sweep_cases() if arguments.sweep else CASES))
        parser.error(f"no case and implementation match; the cases are\n  {names}")
    try:
        require_green_tests()
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    told = environment()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    failed = 0
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *told])
        writer.writeheader()
        for row in measure_cases(pairs, device, Meter(device)):
            writer.writerow({name: f"{v:.6g}" if isinstance(v, float) else v for name, v in (row | told).items()})
            file.flush()
            failed += row["status"].startswith("failed")
            _print(row)
    print(f"{told['device']}: {arguments.out}" + (f"; {failed} rows failed" if failed else ""))
    return 1 if failed else 0


def _print(row: dict[str, object]) -> None:
    parts = " / ".join(f"{row.get(f'{part}_ms', math.nan):.3f}" for part in ("forward", "backward", "step"))
    share, memory = row.get("forward_share_of_ceiling", math.nan), row.get("peak_memory_mib", math.nan)
    name = f"{row['case']:36} {row['impl']:15}"
    print(f"{name} {parts} ms, {share:.3f} of the ceiling, {memory:,.0f} MiB, {row['status']}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
