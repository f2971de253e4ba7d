"""What an error keeps alive, and whether it says that a device's memory is spent."""

from __future__ import annotations

import traceback

import torch

# What the driver, cuBLAS and Triton's launcher raise as a plain RuntimeError.
MEMORY_MESSAGES = ("CUDA error: out of memory", "Triton Error [CUDA]: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def chain(error: BaseException) -> list[BaseException]:
    """The error and what it was raised from or while handling."""
    found: list[BaseException] = []
    pending: list[BaseException | None] = [error]
    while pending:
        current = pending.pop()
        if current is not None and current not in found:
            found.append(current)
            pending += [current.__cause__, current.__context__]
    return found


def drop_frames(error: BaseException) -> None:
    """Empties the frames that the error and its causes hold, so that their tensors can be freed."""
    for link in chain(error):
        traceback.clear_frames(link.__traceback__)
        link.__traceback__ = None
        link.__cause__ = link.__context__ = None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device's memory is spent: by the error itself, not by what it was raised from."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in MEMORY_MESSAGES)
