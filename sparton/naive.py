"""The head as SPLADE writes it: logits, ReLU, log1p, mask, maximum, each of them a (B, S, V) tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from sparton.packing import padded_index


def naive_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    activation: str,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensor:
    """Computes the head with autograd's own operations, in SPLADE's order (Formal et al., arXiv 2109.10086, eq. 2).

    Args are those of :func:`sparton.lsr_head`, checked; ``dtype`` is what the product runs in. Where autocast is on,
    it decides about the dtype of ReLU and log1p, as it does for users of this code elsewhere.

    Returns:
        (B, V) in ``out_dtype``. Keeps about four (B, S, V) tensors for the backward pass.
    """
    if cu_seqlens is not None:
        rows, attention_mask = padded_index(cu_seqlens, len(hidden) if max_seqlen is None else max_seqlen)
        hidden = hidden[rows]
    hidden = hidden.to(dtype)
    if attention_mask is not None:
        attention_mask = attention_mask.bool()
        # NaN times zero is NaN: what stands in the padding must be gone before the product, and so from dW as well.
        hidden = hidden.masked_fill(~attention_mask[..., None], 0)
    if hidden.shape[1] == 0:  # no text has a token: one masked slot gives each of them its zeros
        hidden, attention_mask = hidden.new_zeros(len(hidden), 1, weight.shape[1]), hidden.new_zeros(len(hidden), 1)
    logits = torch.nn.functional.linear(hidden, weight.to(dtype), None if bias is None else bias.to(dtype))
    values = torch.log1p(torch.relu(logits))
    if activation == "log1p_log1p":
        values = torch.log1p(values)
    if attention_mask is not None:
        values = values * attention_mask[..., None].to(values.dtype)
    return values.max(dim=1).values.to(out_dtype)
