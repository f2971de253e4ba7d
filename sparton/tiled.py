"""The head over tiles of the vocabulary in PyTorch, for every device: no (B, S, V) tensor, its own gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

# Logits of one tile, in elements: about the second-level cache of a CPU core, enough to fill a GPU.
TILE_ELEMENTS = {"cpu": 2**19, "cuda": 2**25}
# Tokens of sequences of similar length that a CPU handles together.
GROUP_TOKENS = 2048


def position_dtype(max_seqlen: int) -> torch.dtype:
    """The smallest integer that holds positions 0 .. max_seqlen - 1."""
    return torch.uint8 if max_seqlen <= 2**8 else torch.int16 if max_seqlen <= 2**15 else torch.int32


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in: float32, and float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def factor_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the derivative is kept in: float16 where the operands have 16 bits.

    It rounds a derivative of 2^-14 or more by 2^-11 of it at most, a smaller one by 2^-25: that is from logits of
    16,383 on, of 1,900 with ``log1p_log1p``. MiniLM's are below 22 (docs/log.md).
    """
    return torch.float16 if dtype.itemsize == 2 else sum_dtype(dtype)


def activate(z: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Applies the activation to the maximal logits.

    Returns:
        ``log1p(relu(z))`` (once more for ``log1p_log1p``) and its derivative by z, 0 where z <= 0; dtype of ``z``.
    """
    positive = z.relu()
    out, factor = positive.log1p(), 1 / (1 + positive)
    if activation == "log1p_log1p":
        factor = factor / (1 + out)
        out = out.log1p()
    return out, torch.where(z > 0, factor, 0)


def _groups(cu_seqlens: Tensor, max_seqlen: int) -> list[tuple[Tensor, int]]:
    """Sequences that are padded together, and to what length: by length on the CPU, all at once elsewhere."""
    batch = len(cu_seqlens) - 1
    if cu_seqlens.device.type != "cpu":
        return [(torch.arange(batch, device=cu_seqlens.device), max_seqlen)]
    lengths = cu_seqlens.diff()
    order = lengths.argsort(stable=True)
    groups, members = [], []
    for b, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        if members and (len(members) + 1) * length > GROUP_TOKENS:
            groups.append((torch.tensor(members), longest))
            members = []
        members.append(b)
        longest = length
    return [*groups, (torch.tensor(members, dtype=torch.int64), longest if members else 0)]


def _product(rows: Tensor, tile: Tensor) -> Tensor:
    """(M, D) times (T, D) transposed with the sums kept: 16-bit operands give float32 logits."""
    if rows.dtype in (torch.float32, torch.float64):
        return rows @ tile.T
    if rows.device.type == "cuda":
        return torch.mm(rows, tile.T, out_dtype=torch.float32)
    return rows.float() @ tile.float().T


def tiled_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    activation: str,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    *,
    need_positions: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the head tile by tile.

    Args:
        hidden: (N, D) packed rows; weight: (V, D); bias: (V,) or None; each of any floating dtype.
        cu_seqlens: (B + 1,); max_seqlen: upper bound of the lengths.
        dtype: of the product's operands; its sums are float32 (float64 for float64).
        need_positions: False leaves the positions at zero, for half the time of the maximum on a CPU.

    Returns:
        ``out`` (B, V) in ``out_dtype``, ``factor`` (B, V) in :func:`factor_dtype` (the derivative of the output by the
        maximal logit) and ``positions`` (B, V) in the smallest integer that fits.
    """
    batch, vocab = len(cu_seqlens) - 1, len(weight)
    best = torch.empty(batch, vocab, dtype=sum_dtype(dtype), device=hidden.device)
    positions = torch.zeros(batch, vocab, dtype=position_dtype(max_seqlen), device=hidden.device)
    for members, longest in _groups(cu_seqlens, max_seqlen):
        if longest == 0 or len(hidden) == 0:
            best[members] = 0
            continue
        ends = torch.stack([cu_seqlens[members], cu_seqlens[members + 1]], dim=1)
        slots = ends[:, :1].long() + torch.arange(longest, device=hidden.device)
        rows = hidden[slots.minimum(ends[:, 1:].long() - 1).clamp_min(0).flatten()].to(dtype)
        tile = max(16, TILE_ELEMENTS.get(hidden.device.type, TILE_ELEMENTS["cpu"]) // len(rows))
        for start in range(0, vocab, tile):
            logits = _product(rows, weight[start : start + tile].to(dtype)).view(len(members), longest, -1)
            if need_positions:
                value, position = logits.max(dim=1)
                positions[members, start : start + tile] = position.to(positions.dtype)
            else:
                value = logits.amax(dim=1)
            best[members, start : start + tile] = value
    if bias is not None:
        best += bias
    best.masked_fill_((cu_seqlens.diff() == 0)[:, None], 0)
    out, factor = activate(best, activation)
    return out.to(out_dtype), factor.to(factor_dtype(dtype)), positions


def _sum_by_owner(owner: Tensor, owners: int, table: Tensor, index: Tensor, value: Tensor) -> Tensor:
    """Sums ``value[e] * table[index[e]]`` over the entries e of each owner, always in the same order: (owners, D)."""
    if len(index) == 0:
        return torch.zeros(owners, table.shape[1], dtype=value.dtype)
    key, order = owner.sort(stable=True)
    starts = torch.searchsorted(key, torch.arange(owners + 1))
    return embedding_bag(
        index[order], table.to(value.dtype), starts,
        mode="sum", per_sample_weights=value[order], include_last_offset=True,
    )


def _sparse_gradients(
    g: Tensor, rows: Tensor, hidden: Tensor, weight: Tensor, need: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Both gradients from the active entries alone, which a CPU can count."""
    word, text = g.T.nonzero(as_tuple=True)
    value, row = g[text, word], rows[text, word]
    d_hidden = _sum_by_owner(row, len(hidden), weight, word, value) if need[0] else None
    d_weight = _sum_by_owner(word, len(weight), hidden, row, value) if need[1] else None
    return d_hidden, d_weight


def _dense_gradients(
    g: Tensor, rows: Tensor, hidden: Tensor, weight: Tensor, end: Tensor, need: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Both gradients by two products a tile: counting the active entries would mean waiting for the device.

    A tile's entries are scattered into a (T, N) matrix. No two fall on the same place, so the result is deterministic;
    inactive ones go to an extra column.
    """
    tokens, dim = hidden.shape
    # Rows past the end may hold anything, and zero times NaN is NaN.
    hidden = hidden.masked_fill(torch.arange(tokens, device=g.device)[:, None] >= end, 0)
    d_hidden = torch.zeros(tokens, dim, dtype=g.dtype, device=g.device) if need[0] else None
    d_weight = torch.empty(len(weight), dim, dtype=g.dtype, device=g.device) if need[1] else None
    tile = max(16, TILE_ELEMENTS.get(g.device.type, TILE_ELEMENTS["cpu"]) // max(tokens, 1))
    for start in range(0, len(weight), tile):
        part = slice(start, start + tile)
        values = g[:, part].T
        places = torch.where(values != 0, rows[:, part].T, tokens)
        scattered = g.new_zeros(len(values), tokens + 1).scatter_(1, places, values)[:, :tokens]
        if need[0]:
            d_hidden += scattered.T @ weight[part].to(g.dtype)
        if need[1]:
            d_weight[part] = scattered @ hidden.to(g.dtype)
    return d_hidden, d_weight


def tiled_backward(
    g: Tensor, positions: Tensor, hidden: Tensor, weight: Tensor, cu_seqlens: Tensor, need: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients by hidden and weight from the gradient by the maximal logits.

    Args:
        g: (B, V) float32, zero where nothing flows.
        positions: (B, V); hidden: (N, D); weight: (V, D); cu_seqlens: (B + 1,).
        need: whether the gradients by hidden and by weight are wanted.

    Returns:
        (N, D) and (V, D), in the dtypes of ``hidden`` and ``weight``, or None where not wanted.
    """
    rows = cu_seqlens[:-1, None].long() + positions.long()
    if g.device.type == "cpu":
        d_hidden, d_weight = _sparse_gradients(g, rows, hidden, weight, need)
    else:
        d_hidden, d_weight = _dense_gradients(g, rows, hidden, weight, cu_seqlens[-1], need)
    return (
        None if d_hidden is None else d_hidden.to(hidden.dtype),
        None if d_weight is None else d_weight.to(weight.dtype),
    )
