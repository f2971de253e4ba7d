"""What all tests share: Triton's interpreter, made faster, where there is no GPU, the device, seeds."""

from __future__ import annotations

import os
import signal

import torch

if not torch.cuda.is_available():
    # Before triton is imported anywhere: its functions are wrapped at import.
    os.environ["TRITON_INTERPRET"] = "1"
    import fast_interpreter

    fast_interpreter.speed_up()

import pytest

from lightning_modules.environment import use_expandable_segments

use_expandable_segments()  # as train.py does

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(workers)))

# A shell ignores Ctrl-C in what it runs in its background, and so would the processes in which tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def device() -> torch.device:
    """The GPU where there is one, so that the same tests run compiled there; else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
