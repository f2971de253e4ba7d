"""InfoNCE: softmax cross-entropy of each query's positive among in-batch and hard negatives."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparton.losses.scores import all_scores, check_pair, check_positive, own_scores


class InfoNCE(nn.Module):
    """Cross-entropy of the positive document among the documents of the batch.

    ``mean_i -log( exp(z[i, i*K]) / sum_j exp(z[i, j]) )`` with ``z = scale * query @ doc.T / temperature``:
    van den Oord et al., arXiv 1807.03748, eq. 4; with in-batch negatives as in Karpukhin et al., arXiv 2004.04906.

    Memory: the scores ``(B, B*K)`` in float32 and their softmax; nothing of the size (B, B, V).

    Args:
        temperature: divides the scores, above 0.
        scale: multiplies the scores, above 0.
        in_batch: True compares a query with every document of the batch; False only with its own K.

    Raises:
        ValueError: for a temperature or scale that is not a finite number above 0.
    """

    def __init__(self, *, temperature: float = 1.0, scale: float = 1.0, in_batch: bool = True) -> None:
        super().__init__()
        self.temperature = check_positive("temperature", temperature, "InfoNCE")
        self.scale = check_positive("scale", scale, "InfoNCE")
        self.in_batch = in_batch

    def forward(
        self,
        query: Tensor,
        doc: Tensor,
        *,
        teacher_scores: Tensor | None = None,
        false_negatives: Tensor | None = None,
    ) -> Tensor:
        """Computes the mean cross-entropy over the queries.

        Args:
            query: ``(B, V)``, fp32, fp64, bf16 or fp16; scores are computed in float32 (float64 for float64).
            doc: ``(B * K, V)``; the first of a query's K rows is its positive, the others are hard negatives.
            teacher_scores: not used; part of the signature that all ranking losses share.
            false_negatives: ``(B, B * K)`` bool, True leaves that document out of that query's denominator. A
                query's own positive always stays in.

        Returns:
            A scalar, float32 (float64 for float64 input).

        Raises:
            ValueError: for shapes that don't fit, or ``in_batch=False`` without any hard negative.
        """
        per_query = check_pair(query, doc, "InfoNCE")
        batch = query.shape[0]
        rows = torch.arange(batch, device=query.device)
        left_out = self._left_out(false_negatives, batch, per_query)
        if self.in_batch:
            scores, target = all_scores(query, doc), rows * per_query
        else:
            if per_query < 2:
                raise ValueError(
                    "InfoNCE: in_batch=False needs hard negatives, got one document per query; "
                    "use data with negatives, or in_batch=True"
                )
            scores, target = own_scores(query, doc, per_query), torch.zeros_like(rows)
            if left_out is not None:
                left_out = left_out.view(batch, batch, per_query)[rows, rows]
        if left_out is not None:
            is_positive = F.one_hot(target, scores.shape[1]).bool()
            scores = scores.masked_fill(left_out & ~is_positive, float("-inf"))
        return F.cross_entropy(scores * (self.scale / self.temperature), target)

    @staticmethod
    def _left_out(false_negatives: Tensor | None, batch: int, per_query: int) -> Tensor | None:
        """Checks the mask of false negatives."""
        if false_negatives is None:
            return None
        shape = (batch, batch * per_query)
        if tuple(false_negatives.shape) != shape or false_negatives.dtype != torch.bool:
            raise ValueError(
                f"InfoNCE: false_negatives must be a bool tensor of shape (B, B*K) = {shape}, "
                f"got {tuple(false_negatives.shape)} of {false_negatives.dtype}; mark with True what to leave out"
            )
        return false_negatives
