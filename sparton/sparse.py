"""encode_sparse(): texts' representations as CSR, for encoding; the dense ones exist for a block of texts at a time."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sparton.functional import _check_layout, _check_tensors, lsr_head

# Dense outputs that exist at once, in elements: enough texts to keep a GPU busy, and nonzero() indexes below 2^31.
BLOCK_ELEMENTS = 2**26


class SparseVectors(NamedTuple):
    """B sparse vectors in CSR, on the device that computed them.

    Attributes:
        crow: (B + 1,) int64, text b owns entries ``crow[b]:crow[b + 1]``.
        indices: (nnz,) int32 words, ascending within a text.
        values: (nnz,) in the dtype of the output.
    """

    crow: Tensor
    indices: Tensor
    values: Tensor


@torch.no_grad()
def encode_sparse(
    hidden: Tensor,  # (B, S, D) or (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None = None,  # (V,)
    attention_mask: Tensor | None = None,  # (B, S)
    *,
    cu_seqlens: Tensor | None = None,  # (B + 1,)
    max_seqlen: int | None = None,
    top_k: int | None = None,
    threshold: float = 0.0,
    activation: str = "log1p",
    impl: str = "auto",
) -> SparseVectors:
    """Computes the entries of :func:`sparton.lsr_head` that are above a threshold, as CSR and without gradients.

    Equivalent PyTorch, without ``top_k``::

        rep = sparton.lsr_head(hidden, weight, bias, attention_mask)
        csr = (rep * (rep > threshold)).to_sparse_csr()

    It waits for the device: how many entries there are decides the size of the result (once for each block of texts),
    and a packed batch of several blocks is cut at offsets that the host must know.

    Args:
        hidden, weight, bias, attention_mask, cu_seqlens, max_seqlen, activation, impl: as in ``lsr_head``.
        top_k: keep so many of a text's largest entries; a tie goes to the lower word. None keeps all.
        threshold: keep entries above it, compared in the output's dtype.

    Returns:
        Vectors in the dtype of the head's output. The dense matrix exists for blocks of texts of at most 2^26 elements
        (and one text at least), and never leaves the device.

    Raises:
        ValueError, TypeError: as ``lsr_head``, and for a ``top_k`` below 1 or a ``threshold`` that is not >= 0.
    """
    _check_layout(hidden, attention_mask, cu_seqlens, max_seqlen)
    _check_tensors(hidden, weight, bias)
    _check_choice(top_k, threshold)
    batch = len(hidden) if cu_seqlens is None else len(cu_seqlens) - 1
    step = max(1, BLOCK_ELEMENTS // max(len(weight), 1))
    offsets = None if cu_seqlens is None or batch <= step else cu_seqlens.tolist()
    blocks = []
    for first in range(0, max(batch, 1), step):
        block = slice(first, min(first + step, batch))
        rows, mask, cu = hidden, attention_mask, cu_seqlens
        if offsets is not None:
            rows = hidden[offsets[block.start] : offsets[block.stop]]
            cu = cu_seqlens[block.start : block.stop + 1] - offsets[block.start]
        elif cu_seqlens is None:
            rows, mask = hidden[block], None if attention_mask is None else attention_mask[block]
        rep = lsr_head(
            rows, weight, bias, mask, cu_seqlens=cu, max_seqlen=max_seqlen, activation=activation, impl=impl
        )
        blocks.append(_compress(rep, top_k, threshold))
    return _csr(blocks)


@torch.no_grad()
def compress(rep: Tensor, *, top_k: int | None = None, threshold: float = 0.0) -> SparseVectors:
    """Picks the entries of dense representations that are above a threshold, on their device.

    Args:
        rep: (B, V) of any floating dtype, non-negative, at most 2^31 - 1 elements.
        top_k, threshold: as in :func:`encode_sparse`.

    Returns:
        CSR in the dtype of ``rep``. A NaN is kept, so that an error upstream stays visible.

    Raises:
        ValueError: if ``rep`` isn't a matrix, for a ``top_k`` below 1 or a ``threshold`` that is not >= 0.
    """
    if rep.ndim != 2:
        raise ValueError(f"rep: expected a matrix (B, V), got shape {tuple(rep.shape)}; add the batch dimension")
    _check_choice(top_k, threshold)
    return _csr([_compress(rep, top_k, threshold)])


def _check_choice(top_k: int | None, threshold: float) -> None:
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: expected a number >= 1 or None for all entries, got {top_k}")
    if not 0 <= threshold < math.inf:
        raise ValueError(f"threshold: expected a finite number >= 0, as outputs are never negative, got {threshold}")


def _compress(rep: Tensor, top_k: int | None, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Entries of each text (B,) int64, their words int32 and their values."""
    keep = ~(rep <= threshold)
    if top_k is not None and top_k < rep.shape[1] and len(rep):
        keep &= _largest(rep, top_k)
    entries = keep.flatten().nonzero().squeeze(1)
    words = (entries % max(rep.shape[1], 1)).int()
    return keep.sum(1), words, rep.flatten()[entries]


def _largest(rep: Tensor, top_k: int) -> Tensor:
    """(B, V) bool, the ``top_k`` largest entries of each row.

    topk() chooses freely among equal values, so only the smallest value that belongs is taken from it; the lowest
    words that have this value fill up the row.
    """
    last = rep.topk(top_k, dim=1).values[:, -1:]
    larger, equal = ~(rep <= last), rep == last
    missing = top_k - larger.sum(1, keepdim=True)
    return larger | (equal & (equal.cumsum(1, dtype=torch.int32) <= missing))


def _csr(blocks: list[tuple[Tensor, Tensor, Tensor]]) -> SparseVectors:
    counts, words, values = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    return SparseVectors(torch.nn.functional.pad(counts.cumsum(0), (1, 0)), words, values)
