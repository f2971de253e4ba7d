"""Distillation from a teacher's scores: MarginMSE on differences, KL divergence on distributions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from sparton.losses.scores import check_pair, check_positive, check_teacher, own_scores


class MarginMSE(nn.Module):
    """Squared error between the student's and the teacher's margins of the positive over each negative.

    ``mean_{i, k >= 1} ((s[i, 0] - s[i, k]) - (t[i, 0] - t[i, k]))^2`` over all K - 1 negatives of each query:
    Hofstätter et al., arXiv 2010.02666.
    """

    def forward(
        self,
        query: Tensor,
        doc: Tensor,
        *,
        teacher_scores: Tensor | None = None,
        false_negatives: Tensor | None = None,
    ) -> Tensor:
        """Computes the mean squared difference of margins.

        Args:
            query: ``(B, V)``, fp32, fp64, bf16 or fp16; scores are computed in float32 (float64 for float64).
            doc: ``(B * K, V)`` with K >= 2; the first of a query's K rows is its positive.
            teacher_scores: ``(B, K)``, the teacher's scores in the same order.
            false_negatives: not used (no other query's document is looked at); part of the shared signature.

        Returns:
            A scalar, float32 (float64 for float64 input).

        Raises:
            ValueError: for missing scores, K < 2 or shapes that don't fit.
        """
        per_query = check_pair(query, doc, "MarginMSE")
        teacher = check_teacher(teacher_scores, query.shape[0], per_query, "MarginMSE")
        student = own_scores(query, doc, per_query)
        teacher = teacher.to(student.dtype)
        return F.mse_loss(student[:, :1] - student[:, 1:], teacher[:, :1] - teacher[:, 1:])


class KLDistillation(nn.Module):
    """KL divergence from the teacher's to the student's softmax over the K documents of a query.

    ``T^2 * mean_i sum_k p[i, k] * (log p[i, k] - log q[i, k])`` with ``p = softmax(t / T)``, ``q = softmax(s / T)``:
    Hinton et al., arXiv 1503.02531, section 2 (the factor T^2 keeps the size of the gradient); over rankings as in
    Lin et al., arXiv 2010.11386.

    Args:
        temperature: T, above 0, on both sides.

    Raises:
        ValueError: for a temperature that is not a finite number above 0.
    """

    def __init__(self, *, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = check_positive("temperature", temperature, "KLDistillation")

    def forward(
        self,
        query: Tensor,
        doc: Tensor,
        *,
        teacher_scores: Tensor | None = None,
        false_negatives: Tensor | None = None,
    ) -> Tensor:
        """Computes the divergence, averaged over the queries.

        Args:
            query: ``(B, V)``, fp32, fp64, bf16 or fp16; scores are computed in float32 (float64 for float64).
            doc: ``(B * K, V)`` with K >= 2; the first of a query's K rows is its positive.
            teacher_scores: ``(B, K)``, the teacher's scores in the same order.
            false_negatives: not used (no other query's document is looked at); part of the shared signature.

        Returns:
            A scalar, float32 (float64 for float64 input).

        Raises:
            ValueError: for missing scores, K < 2 or shapes that don't fit.
        """
        per_query = check_pair(query, doc, "KLDistillation")
        teacher = check_teacher(teacher_scores, query.shape[0], per_query, "KLDistillation")
        student = own_scores(query, doc, per_query)
        log_q = F.log_softmax(student / self.temperature, dim=1)
        log_p = F.log_softmax(teacher.to(student.dtype) / self.temperature, dim=1)
        return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * self.temperature**2
