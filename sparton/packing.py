"""Between the padded and the packed layout, without ever waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(hidden: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Puts the unmasked rows of a padded batch first, sequence by sequence.

    Args:
        hidden: (B, S, D).
        attention_mask: (B, S) of 0/1 or bool with any pattern, or None for no padding.

    Returns:
        The packed rows, (B * S, D): the number of real rows is known on the device only, so the rows past
        ``cu_seqlens[B]`` are the masked ones, which nothing reads; and ``cu_seqlens``, (B + 1,) int32 or int64.
    """
    batch, seqlen, dim = hidden.shape
    index_dtype = torch.int32 if batch * seqlen < 2**31 else torch.int64
    if attention_mask is None:
        steps = torch.arange(batch + 1, dtype=index_dtype, device=hidden.device)
        return hidden.reshape(batch * seqlen, dim), steps * seqlen
    real = attention_mask.bool()
    cu_seqlens = torch.zeros(batch + 1, dtype=index_dtype, device=hidden.device)
    cu_seqlens[1:] = real.sum(1).cumsum(0)
    order = real.flatten().logical_not().to(torch.uint8).argsort(stable=True)
    return hidden.reshape(batch * seqlen, dim).index_select(0, order), cu_seqlens


def padded_index(cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
    """Rows of the packed layout for every slot of a padded one.

    Args:
        cu_seqlens: (B + 1,) int32 or int64.
        max_seqlen: slots for each sequence.

    Returns:
        (B, max_seqlen) int64 rows, where a slot past the end repeats the sequence's last row (a repeated row can't
        change a maximum; an empty sequence names row 0 or its neighbour's), and (B, max_seqlen) bool, True for slots
        that are the sequence's own.
    """
    start, stop = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    slots = start + torch.arange(max_seqlen, device=cu_seqlens.device)
    return slots.minimum(stop - 1).clamp_min(0), slots < stop
