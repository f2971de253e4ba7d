"""The kernels under compute-sanitizer: no access outside of a tensor, no race in shared memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

TOOL = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(TOOL is None, reason="needs compute-sanitizer"),
]
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


def sanitize(tool: str, *options: str, **changes: object) -> subprocess.CompletedProcess:
    """Runs the steps under a tool; skips where the tool can't work."""
    steps = STEPS.format(**{"hoppers": ("1", "0"), "shapes": SHAPES, "change": "", "need_hidden": True} | changes)
    command = [TOOL, "--tool", tool, *options, "--error-exitcode", str(FOUND), sys.executable, "-c", steps]
    # An allocation of its own for each tensor: within a cached block nothing is out of bounds.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    if any(refusal in done.stdout + done.stderr for refusal in REFUSALS):
        pytest.skip(f"{tool} refuses this device")
    return done


def assert_clean(done: subprocess.CompletedProcess) -> None:
    """The steps ran to their end and the tool has nothing to say."""
    assert done.returncode == 0 and "finished" in done.stdout, done.stdout[-4000:] + done.stderr[-1000:]


def test_memcheck_finds_nothing():
    assert_clean(sanitize("memcheck", "--report-api-errors", "no"))


@pytest.mark.parametrize("hopper", ["1", "0"])  # the Gluon kernel where the card has it, and the plain one
def test_racecheck_finds_nothing(hopper):
    assert_clean(sanitize("racecheck", hoppers=(hopper,)))


def test_memcheck_finds_a_position_that_points_outside():
    """Otherwise its silence would say nothing."""
    garbage = "positions = torch.full(positions.shape, 2**20, dtype=torch.int32).cuda()"
    shape = "(torch.bfloat16, 64, [5, 0, 17, 300])"
    done = sanitize("memcheck", hoppers=("0",), shapes=shape, change=garbage, need_hidden=False)
    assert done.returncode != 0 and "Invalid __global__ read" in done.stdout, done.stdout[-4000:]
