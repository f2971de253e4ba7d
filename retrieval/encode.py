"""Texts to sparse vectors: batches through the encoder, only active dimensions kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
import scipy.sparse as sp
import torch
from rich.progress import Progress
from torch import Tensor, nn

from datamodules.collate import TextTokenizer
from sparton.sparse import compress

SIDES = {"query": "queries", "doc": "documents"}
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def to_csr(rep: Tensor, top_k: int | None = None) -> sp.csr_matrix:
    """The non-zero entries of a batch of representations.

    They are picked on the tensor's device, so that only they travel to the host.

    Args:
        rep: (B, V) of any floating dtype, non-negative.
        top_k: keep so many of a text's largest entries; None keeps all.

    Returns:
        (B, V) float32, column indices ascending within a row.

    Raises:
        ValueError: if ``rep`` isn't a matrix.
    """
    crow, indices, values = compress(rep, top_k=top_k)
    arrays = (values.float().cpu().numpy(), indices.cpu().numpy(), crow.cpu().numpy())
    return sp.csr_matrix(arrays, shape=tuple(rep.shape))


def encode_texts(
    encoder: nn.Module,
    texts: Sequence[str],
    side: str,
    *,
    batch_size: int = 64,
    batch_tokens: int | None = None,
    device: torch.device | str | None = None,
    top_k: int | None = None,
    progress: bool | Callable[[int, int], None] = False,
    autocast_dtype: torch.dtype | None = None,
) -> sp.csr_matrix:
    """Encodes texts without gradients and in evaluation mode; dense vectors exist for one batch at a time only.

    Texts of similar length share a batch, the longest come first: what doesn't fit in memory fails at once.

    Args:
        encoder: maps a TextBatch to (B, V) and has ``query_tokenizer`` and ``doc_tokenizer`` (SparseEncoder).
        texts: n of them.
        side: ``"query"`` or ``"doc"``: which tokenizer, and so which maximum length.
        batch_size: the most texts in a batch; dense vectors of so many exist at once.
        batch_tokens: the most tokens in a batch, padding included (a longer text is a batch of its own); None sets no
            limit.
        device: where to encode; the encoder is moved there. None leaves it where it is.
        top_k: keep so many of a text's largest entries; None keeps all.
        progress: True shows a bar; a function is called with the number of texts done and of all, after each batch.
        autocast_dtype: compute under autocast in this dtype (``torch.bfloat16`` on CUDA); None doesn't.

    Returns:
        (n, V) float32 in the order of ``texts``.

    Raises:
        ValueError: for an unknown side, no text, a number below 1, or vectors that aren't finite.
    """
    _check(texts, side, {"batch_size": batch_size, "batch_tokens": batch_tokens, "top_k": top_k})
    device = torch.device(device) if device is not None else next(encoder.parameters()).device
    encoder.to(device)
    tokenize = encoder.query_tokenizer if side == "query" else encoder.doc_tokenizer
    order, lengths = _longest_first(texts, tokenize, batch_size, batch_tokens)
    autocast = torch.autocast(device.type, dtype=autocast_dtype) if autocast_dtype is not None else nullcontext()
    pieces, done = [], 0
    with _evaluation_mode(encoder), torch.inference_mode(), autocast, _reporter(progress, side) as report:
        while done < len(order):
            rows = batch_size
            if lengths is not None:
                rows = min(rows, max(1, batch_tokens // encoder.padded_width(lengths[order[done]])))
            batch = tokenize([texts[index] for index in order[done : done + rows]])
            rep = encoder(batch.to(device, non_blocking=True))
            pieces.append(to_csr(rep, top_k))
            if not np.isfinite(pieces[-1].data).all():
                raise ValueError(
                    f"encoder: expected finite {side} vectors, got NaN or infinity; the weights have diverged or the"
                    " precision is too low: load another checkpoint or encode in fp32"
                )
            done = min(done + rows, len(order))
            report(done, len(order))
    return _in_order(pieces, order)


def _check(texts: Sequence[str], side: str, numbers: dict[str, int | None]) -> None:
    if side not in SIDES:
        raise ValueError(f"side: expected 'query' or 'doc', got {side!r}; correct side")
    if not texts:
        raise ValueError(f"texts: expected at least one text to encode, got none; check the {side} texts' source")
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected a number >= 1, got {value}; raise {name}")


def _longest_first(
    texts: Sequence[str], tokenize: TextTokenizer, batch_size: int, batch_tokens: int | None
) -> tuple[np.ndarray, list[int] | None]:
    """The order in which texts are encoded, and their numbers of tokens where a budget needs them.

    Where no batch can exceed the budget, characters stand for tokens: nearly the same order, without tokenising
    everything twice.
    """
    if batch_tokens is None or batch_size * tokenize.max_length <= batch_tokens:
        return np.argsort([-len(text) for text in texts], kind="stable"), None
    lengths = tokenize.lengths(texts)
    return np.argsort([-length for length in lengths], kind="stable"), lengths


def _in_order(pieces: list[sp.csr_matrix], order: np.ndarray) -> sp.csr_matrix:
    """Stacks ``pieces``, whose row i belongs at ``order[i]``, and empties the list on the way.

    The result and the pieces not yet copied are all that exists: vectors before training have thousands of active
    dimensions, of which no third copy fits.
    """
    counts = np.empty(len(order), dtype=np.int64)
    counts[order] = np.concatenate([np.diff(piece.indptr) for piece in pieces])
    indptr = np.concatenate([[0], counts.cumsum()])
    columns = pieces[0].shape[1]
    data, indices = np.empty(indptr[-1], dtype=np.float32), np.empty(indptr[-1], dtype=np.int32)
    last = len(order)
    while pieces:
        piece = pieces.pop()
        last -= piece.shape[0]
        for row, start, end in zip(order[last:], piece.indptr[:-1], piece.indptr[1:], strict=False):
            data[indptr[row] : indptr[row + 1]] = piece.data[start:end]
            indices[indptr[row] : indptr[row + 1]] = piece.indices[start:end]
    return sp.csr_matrix((data, indices, indptr), shape=(len(order), columns))


@contextmanager
def _reporter(progress: bool | Callable[[int, int], None], side: str) -> Iterator[Callable[[int, int], None]]:
    """What is called with the number of texts done and of all."""
    if callable(progress):
        yield progress
        return
    with Progress(disable=not progress) as bar:
        task = bar.add_task(f"encode {SIDES[side]}", total=None)
        yield lambda done, total: bar.update(
            task, completed=done, total=total, description=f"encode {total:,} {SIDES[side]}"
        )


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
