"""The kernels under compute-sanitizer: no access outside of a tensor, no race in shared memory."""

from __future__ import annotations

import ast
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton")

TOOL = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
FOUND = 86  # exit status of the tool where it has found something
REFUSALS = ("Device not supported", "LibraryNotLoaded")  # a driver that lets no tool look

SHAPES = """
    (torch.bfloat16, 64, [5, 0, 17, 300]), (torch.bfloat16, 72, [9, 30] * 5), (torch.float32, 13, [5, 0, 40])
"""
STEPS = """
import os
import torch
from sparton.ops import lsr_backward, lsr_forward
for hopper in {hoppers}:
    os.environ["SPARTON_HOPPER"] = hopper
    for dtype, dim, lengths in ({shapes},):
        hidden, weight, bias = (torch.randn(*shape) for shape in ((sum(lengths), dim), (201, dim), (201,)))
        hidden, weight, bias = (tensor.to(dtype).cuda() for tensor in (hidden, weight, bias))
        cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32).cuda()
        out, factor, positions = lsr_forward(
            hidden, weight, bias, cu_seqlens, max(lengths), "log1p", dtype, dtype, "triton"
        )
        grad = torch.randn(out.shape).to(dtype).cuda()
        {change}
        need = ({need_hidden}, True, True)
        lsr_backward(grad, factor, positions, hidden, weight, bias, cu_seqlens, max(lengths), *need, "triton")
torch.cuda.synchronize()
print("finished")
"""


def steps(**changes: object) -> str:
    """The program that runs the head's kernels, with other shapes, kernels or positions."""
    return STEPS.format(**{"hoppers": ("1", "0"), "shapes": SHAPES, "change": "", "need_hidden": True} | changes)


def sanitize(tool: str, program: str, *options: str) -> subprocess.CompletedProcess:
    """Runs a program under a tool; skips where the tool can't work."""
    if not torch.cuda.is_available() or TOOL is None:
        pytest.skip("needs a GPU and compute-sanitizer")
    command = [TOOL, "--tool", tool, *options, "--error-exitcode", str(FOUND), sys.executable, "-c", program]
    # An allocation of its own for each tensor: within a cached block nothing is out of bounds.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    repository = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=240)
    if any(refusal in done.stdout + done.stderr for refusal in REFUSALS):
        pytest.skip(f"{tool} refuses this device")
    return done


def assert_clean(done: subprocess.CompletedProcess) -> None:
    """The steps ran to their end and the tool has nothing to say."""
    assert done.returncode == 0 and "finished" in done.stdout, done.stdout[-4000:] + done.stderr[-1000:]


def race_places(said: str) -> set[str]:
    """Where racecheck's hazards are: the file and line of every access, and whatever else it complains of as it stands.

    Args:
        said: its output. A hazard is one line "Race reported between <access>" and a line "and <access>" for each
            other one, where an access ends in "at kernel+0x180 in file.py:276".
    """
    lines = [line for line in said.splitlines() if re.match("=+ .*( access at |Error:|Warning:)", line)]
    places = [re.search(r" access at .+\+0x[0-9a-f]+ in (\S+:\d+)", line) for line in lines]
    return {place[1] if place else line for place, line in zip(places, lines, strict=True)}


def handover_places(module: ModuleType, kernel: str) -> set[str]:
    """The lines to which Triton attributes its own handover to the partitions of a Gluon kernel.

    That is one byte of shared memory for each worker warp: the number of its partition. The default warps store all
    bytes before the partitions and again at the end, a worker reads its own, and each of these accesses has a barrier
    of all threads beside it (docs/log.md shows the instructions). The kernel's first line and that of its call of
    warp_specialize have no other access to shared memory.
    """
    tree = ast.parse(inspect.getsource(module))
    (kernel,) = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == kernel)
    calls = [node for node in ast.walk(kernel) if isinstance(node, ast.Call)]
    (call,) = (node for node in calls if getattr(node.func, "attr", "") == "warp_specialize")
    return {f"{Path(module.__file__).name}:{line}" for line in (kernel.lineno, call.lineno)}


def assert_races_only_at(done: subprocess.CompletedProcess, allowed: set[str]) -> set[str]:
    """The program ran to its end with no hazard but between the allowed places; gives those that it had."""
    places = race_places(done.stdout)
    report = f"{places - allowed}\n" + done.stdout[-4000:] + done.stderr[-1000:]
    assert "finished" in done.stdout and done.returncode == (FOUND if places else 0) and places <= allowed, report
    return places


def test_memcheck_finds_nothing():
    assert_clean(sanitize("memcheck", steps(), "--report-api-errors", "no"))


def test_racecheck_finds_nothing_in_the_plain_kernels():
    assert_clean(sanitize("racecheck", steps(hoppers=("0",))))


@pytest.fixture
def gluon_modules():
    """The Hopper kernel's and the control's."""
    hopper = pytest.importorskip("sparton.kernels.forward_hopper", exc_type=ImportError)
    return hopper, pytest.importorskip("tests.handover_control", exc_type=ImportError)


@pytest.mark.timeout(540)  # two runs of the tool
def test_racecheck_finds_nothing_in_the_gluon_kernel(gluon_modules):
    """Nothing but what it finds, at the lines of Triton's own handover, in a kernel that can have no race."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    hopper, control = gluon_modules
    done = sanitize("racecheck", "from tests.handover_control import main; main()")
    shown = assert_races_only_at(done, handover_places(control, "handover_control_kernel"))
    allowed = handover_places(hopper, "lsr_forward_hopper_kernel") if shown else set()
    assert_races_only_at(sanitize("racecheck", steps(hoppers=("1",))), allowed)


REPORT = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Read access at lsr_forward_hopper_kernel+0x180 in forward_hopper.py:{entry}
=========     and Write access at lsr_forward_hopper_kernel+0xc390 in forward_hopper.py:{entry} [20 hazards]
=========     and Write access at lsr_forward_hopper_kernel+0x17460 in forward_hopper.py:{call} [20 hazards]
=========
finished
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
OTHER = "=========     and Write access at lsr_forward_hopper_kernel+0xe0 in forward_hopper.py:174 [1 hazards]\n"


def test_only_the_handover_is_accepted(gluon_modules):
    """On what racecheck said on an H200 (triton 3.6.0), and on the same with something else among it."""
    hopper, control = gluon_modules
    assert handover_places(control, "handover_control_kernel") == {"handover_control.py:24", "handover_control.py:36"}
    allowed = handover_places(hopper, "lsr_forward_hopper_kernel")
    entry, call = sorted(int(place.split(":")[1]) for place in allowed)
    source = inspect.getsource(hopper).splitlines()
    assert source[entry - 1].startswith("def lsr_forward_hopper_kernel(") and "warp_specialize(" in source[call - 1]
    report = REPORT.format(entry=entry, call=call)

    def done(stdout: str, code: int = FOUND) -> subprocess.CompletedProcess:
        return subprocess.CompletedProcess([], code, stdout, "")

    assert assert_races_only_at(done(report), allowed) == allowed
    assert assert_races_only_at(done("finished\n", 0), allowed) == set()
    rejected = [
        (done(report), set()),  # the control was clean
        (done(report + OTHER), allowed),
        (done(report.replace(f" in forward_hopper.py:{call}", "")), allowed),  # nobody knows where
        (done(report + "========= Error: Potential RAW hazard detected at __shared__ 0x0\n"), allowed),
        (done(report.replace("finished\n", "")), allowed),
        (done("finished\n"), allowed),  # it has found something that isn't understood
        (done(report, 1), allowed),
    ]
    for run, places in rejected:
        with pytest.raises(AssertionError):
            assert_races_only_at(run, places)


def test_memcheck_finds_a_position_that_points_outside():
    """Otherwise its silence would say nothing."""
    garbage = "positions = torch.full(positions.shape, 2**20, dtype=torch.int32).cuda()"
    shape = "(torch.bfloat16, 64, [5, 0, 17, 300])"
    done = sanitize("memcheck", steps(hoppers=("0",), shapes=shape, change=garbage, need_hidden=False))
    assert done.returncode != 0 and "Invalid __global__ read" in done.stdout, done.stdout[-4000:]
