"""What a run happened on (versions, device, commit, date) and which precision that device can train in."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys

import torch

from lightning_modules.resolvers import REPOSITORY

ALLOC_CONF = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # the old name, where it is set, hides the new one
PACKAGES = ("torch", "triton", "lightning", "transformers")
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true", "64-true")


def environment() -> dict[str, str | None]:
    """Returns versions, device, the allocator's options, the commit (None where nothing tells it), the date in UTC."""
    versions = {f"{name}_version": _version(name) for name in PACKAGES}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()})"
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"python_version": platform.python_version()} | versions | {
        "device": device, "alloc_conf": _alloc_conf(), "commit": _commit(), "date": date
    }  # fmt: skip


def use_expandable_segments() -> None:
    """Lets the segments of PyTorch's CUDA allocator grow, unless the environment has other options for it.

    Batches differ in tokens, and segments of fixed sizes fall into pieces that none of the next tensors fits: a batch
    that fitted for two steps (3 GiB allowed) then ran out of memory with a quarter of it free. Linux only; it counts
    for what is allocated after the call, and for processes started by this one.
    """
    if sys.platform == "linux" and torch.cuda.is_available() and not any(name in os.environ for name in ALLOC_CONF):
        os.environ[ALLOC_CONF[-1]] = "expandable_segments:True"


def resolve_precision(precision: str | int, accelerator: str) -> str:
    """Chooses or checks the trainer's precision.

    Args:
        precision: ``auto`` (bf16-mixed on a CUDA device that has bf16, 32-true elsewhere) or one of Lightning's names.
        accelerator: the trainer's: ``auto``, ``gpu``, ``cuda`` or ``cpu``.

    Raises:
        ValueError: for an unknown name, a precision that the device lacks, or a GPU asked for where there is none.
    """
    wants_gpu = accelerator in ("gpu", "cuda")
    on_cuda = torch.cuda.is_available() and (wants_gpu or accelerator == "auto")
    if wants_gpu and not on_cuda:
        raise ValueError(f"trainer.accelerator={accelerator}: expected a CUDA device, found none; use trainer=cpu")
    has_bf16 = on_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "auto":
        return "bf16-mixed" if has_bf16 else "32-true"
    name = {"32": "32-true", "64": "64-true", "16": "16-mixed", "bf16": "bf16-mixed"}.get(str(precision), precision)
    if name not in PRECISIONS:
        raise ValueError(f"trainer.precision: expected auto or one of {', '.join(PRECISIONS)}, got {precision!r}")
    if name.startswith("bf16") and on_cuda and not has_bf16:
        raise ValueError(
            f"trainer.precision={precision}: {torch.cuda.get_device_name()} has no bfloat16;"
            " use trainer.precision=16-mixed or 32-true"
        )
    if name.startswith("16") and not on_cuda:
        raise ValueError(
            f"trainer.precision={precision}: half precision trains on CUDA devices only, and this run is on the CPU;"
            " use trainer.precision=32-true or bf16-mixed"
        )
    return name


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _alloc_conf() -> str | None:
    """The options of PyTorch's CUDA allocator, which decide with the limit what fits; None where it has its own."""
    return next((os.environ[name] for name in ALLOC_CONF if name in os.environ), None) or None


def _commit() -> str | None:
    """What SPARTON_COMMIT says; where it is not set, the checkout's commit, ``-dirty`` where files differ from it."""
    if commit := os.environ.get("SPARTON_COMMIT"):
        return commit
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
