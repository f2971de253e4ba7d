"""Texts to sparse vectors: batches through the encoder, only active dimensions kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
import scipy.sparse as sp
import torch
from rich.progress import track
from torch import Tensor, nn

SIDES = ("query", "doc")
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def to_csr(rep: Tensor) -> sp.csr_matrix:
    """The non-zero entries of a batch of representations.

    They are picked on the tensor's device, so that only they travel to the host.

    Args:
        rep: (B, V) of any floating dtype.

    Returns:
        (B, V) float32, column indices ascending within a row.

    Raises:
        ValueError: if ``rep`` isn't a matrix.
    """
    if rep.ndim != 2:
        raise ValueError(f"rep: expected a matrix (B, V), got shape {tuple(rep.shape)}; add the batch dimension")
    rep = rep.detach()
    rows, columns = rep.nonzero(as_tuple=True)
    values = rep[rows, columns].float().cpu().numpy()
    indptr = np.zeros(len(rep) + 1, dtype=np.int64)
    indptr[1:] = torch.bincount(rows, minlength=len(rep)).cumsum(0).cpu().numpy()
    return sp.csr_matrix((values, columns.int().cpu().numpy(), indptr), shape=tuple(rep.shape))


def keep_largest(rep: Tensor, top_k: int) -> Tensor:
    """``rep`` (B, V) with all but the ``top_k`` largest entries of each row set to zero."""
    values, indices = rep.topk(min(top_k, rep.shape[1]), dim=1)
    return torch.zeros_like(rep).scatter_(1, indices, values)


def encode_texts(
    encoder: nn.Module,
    texts: Sequence[str],
    side: str,
    *,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    top_k: int | None = None,
    progress: str | None = None,
    autocast_dtype: torch.dtype | None = None,
) -> sp.csr_matrix:
    """Encodes texts without gradients and in evaluation mode; dense vectors exist for one batch at a time only.

    Texts of similar length share a batch, the longest come first: what doesn't fit in memory fails at once.

    Args:
        encoder: maps a TextBatch to (B, V) and has ``query_tokenizer`` and ``doc_tokenizer`` (SparseEncoder).
        texts: n of them.
        side: ``"query"`` or ``"doc"``: which tokenizer, and so which maximum length.
        batch_size: texts in a batch.
        device: where to encode; the encoder is moved there. None leaves it where it is.
        top_k: keep so many of a text's largest entries; None keeps all.
        progress: title of a progress bar; None shows none.
        autocast_dtype: compute under autocast in this dtype (``torch.bfloat16`` on CUDA); None doesn't.

    Returns:
        (n, V) float32 in the order of ``texts``.

    Raises:
        ValueError: for an unknown side, no text, a batch size or ``top_k`` below 1, or vectors that aren't finite.
    """
    if side not in SIDES:
        raise ValueError(f"side: expected 'query' or 'doc', got {side!r}; correct side")
    if not texts:
        raise ValueError(f"texts: expected at least one text to encode, got none; check the {side} texts' source")
    for name, value in (("batch_size", batch_size), ("top_k", top_k)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected a number >= 1, got {value}; raise {name}")
    device = torch.device(device) if device is not None else next(encoder.parameters()).device
    encoder.to(device)
    tokenize = encoder.query_tokenizer if side == "query" else encoder.doc_tokenizer
    # Characters stand for tokens: nearly the same order, without tokenising everything twice.
    order = np.argsort([-len(text) for text in texts], kind="stable")
    starts: Iterator[int] | range = range(0, len(order), batch_size)
    if progress is not None:
        starts = track(starts, description=progress)
    autocast = torch.autocast(device.type, dtype=autocast_dtype) if autocast_dtype is not None else nullcontext()
    pieces = []
    with _evaluation_mode(encoder), torch.inference_mode(), autocast:
        for start in starts:
            batch = tokenize([texts[index] for index in order[start : start + batch_size]])
            rep = encoder(batch.to(device, non_blocking=True))
            pieces.append(to_csr(rep if top_k is None else keep_largest(rep, top_k)))
            if not np.isfinite(pieces[-1].data).all():
                raise ValueError(
                    f"encoder: expected finite {side} vectors, got NaN or infinity; the weights have diverged or the"
                    " precision is too low: load another checkpoint or encode in fp32"
                )
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))
    return sp.vstack(pieces, format="csr")[inverse]


def resolve_compute(device: str, precision: str) -> tuple[torch.device, torch.dtype | None]:
    """The device and the autocast dtype that two words of a configuration stand for.

    Args:
        device: ``"auto"`` (CUDA where there is one) or a device's name.
        precision: ``"fp32"`` (no autocast), ``"bf16"`` or ``"fp16"``.

    Raises:
        ValueError: for an unknown word, or where this machine lacks the device or the precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}; correct precision")
    gpu = torch.cuda.is_available()
    try:
        chosen = torch.device(("cuda" if gpu else "cpu") if device == "auto" else device)
    except RuntimeError as error:
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:<number>, got {device!r}; correct it") from error
    if chosen.type == "cuda" and not gpu:
        raise ValueError(f"device: expected one that this machine has, got {device} without a GPU; use device=cpu")
    if precision == "fp16" and chosen.type == "cpu":
        raise ValueError("precision: expected fp32 or bf16 on the CPU, got fp16; use precision=fp32")
    if precision == "bf16" and chosen.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError("precision: expected fp32 or fp16 on this GPU, got bf16; use precision=fp16")
    return chosen, PRECISIONS[precision]


@contextmanager
def _evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every submodule is in the mode it was in before."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
