"""Statistics of the logits that calibration needs, without ever storing the logits of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TILE = 4096  # words of the vocabulary at a time


def logit_deviation(batches: Sequence[Tensor], weight: Tensor, bias: Tensor) -> float:
    """Standard deviation of ``rows @ weight.T + bias`` over all rows and words, without the logits.

    ``sum (h.w + b)^2 = h'Gh + 2 h'(W'b) + b'b`` with the Gram matrix ``G = W'W``.
    """
    dim = weight.shape[1]
    gram = weight.new_zeros(dim, dim, dtype=torch.float64)
    column_sum, cross = (weight.new_zeros(dim, dtype=torch.float64) for _ in range(2))
    for w, b in zip(weight.split(TILE), bias.split(TILE), strict=True):
        w, b = w.double(), b.double()
        gram += w.T @ w
        column_sum += w.sum(0)
        cross += w.T @ b
    total = squares = 0.0
    count = sum(len(rows) for rows in batches)
    for rows in batches:
        h = rows.double()
        total += (h @ column_sum).sum().item()
        squares += ((h @ gram) * h).sum().item() + 2 * (h @ cross).sum().item()
    words = weight.shape[0]
    mean = total / (count * words) + bias.double().mean().item()
    variance = squares / (count * words) + bias.double().square().mean().item() - mean**2
    if not variance > 0:
        raise ValueError("calibrate: expected logits that differ, got a constant; check the model's weights")
    return variance**0.5


def document_maxima(rows: Tensor, counts: Sequence[int], weight: Tensor, bias: Tensor) -> Tensor:
    """Largest logit of each word in each document: (documents, V) float32 on the CPU."""
    tiles = []
    for w, b in zip(weight.split(TILE), bias.split(TILE), strict=True):
        logits = torch.addmm(b.float(), rows, w.float().T)
        tiles.append(torch.stack([part.amax(0) for part in logits.split(counts)]).cpu())
    return torch.cat(tiles, dim=1)
