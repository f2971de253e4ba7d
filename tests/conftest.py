"""What all tests share: Triton's interpreter where there is no GPU, the device, seeds."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    # Before triton is imported anywhere: its functions are wrapped at import.
    os.environ["TRITON_INTERPRET"] = "1"

import pytest


@pytest.fixture
def device() -> torch.device:
    """The GPU where there is one, so that the same tests run compiled there; else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
