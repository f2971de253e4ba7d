"""A weighted sum of named ranking losses, whose parts can be logged one by one."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn


class WeightedSum(nn.Module):
    """Sum of ranking losses, each times its weight; names become ``train/loss_<name>`` in the metrics.

        parts = loss.parts(query, doc, teacher_scores=t)   # {"contrastive": tensor, "margin_mse": tensor}
        total = loss.combine(parts)                        # the same as loss(query, doc, teacher_scores=t)

    Args:
        losses: name to loss; each takes ``(query, doc, *, teacher_scores, false_negatives)``.
        weights: name to weight, one per loss; None weighs each 1.

    Raises:
        ValueError: for no losses, names without a match on the other side, or a weight that is not finite and >= 0.
    """

    def __init__(self, losses: Mapping[str, nn.Module], weights: Mapping[str, float] | None = None) -> None:
        super().__init__()
        if not losses:
            raise ValueError("WeightedSum: losses must name at least one loss, got none; give for example contrastive")
        for name in losses:
            if not str(name).isidentifier():
                raise ValueError(
                    f"WeightedSum: names of losses must be identifiers, got {name!r}; "
                    "use letters, digits and underscores"
                )
        weights = dict.fromkeys(losses, 1.0) if weights is None else dict(weights)
        if set(weights) != set(losses):
            raise ValueError(
                f"WeightedSum: weights must name the same losses, got weights {sorted(weights)} "
                f"for losses {sorted(losses)}; give one weight per loss"
            )
        for name, weight in weights.items():
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
                raise ValueError(
                    f"WeightedSum: the weight of {name} must be a finite number >= 0, got {weight!r}; "
                    "use for example 1.0"
                )
        self.losses = nn.ModuleDict(losses)
        self.weights = {name: float(weights[name]) for name in losses}

    def parts(
        self,
        query: Tensor,
        doc: Tensor,
        *,
        teacher_scores: Tensor | None = None,
        false_negatives: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Computes each loss without its weight.

        Args:
            query: ``(B, V)``, any floating dtype.
            doc: ``(B * K, V)``, ordered by query, the positive first.
            teacher_scores: ``(B, K)`` or None.
            false_negatives: ``(B, B * K)`` bool or None.

        Returns:
            Name to scalar, in the order of ``losses``.

        Raises:
            ValueError: what the losses raise.
        """
        return {
            name: loss(query, doc, teacher_scores=teacher_scores, false_negatives=false_negatives)
            for name, loss in self.losses.items()
        }

    def combine(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Returns the weighted sum of what ``parts`` returned, a scalar."""
        return sum(weight * parts[name] for name, weight in self.weights.items())

    def forward(
        self,
        query: Tensor,
        doc: Tensor,
        *,
        teacher_scores: Tensor | None = None,
        false_negatives: Tensor | None = None,
    ) -> Tensor:
        """Computes the weighted sum, a scalar; arguments as in `parts`."""
        return self.combine(self.parts(query, doc, teacher_scores=teacher_scores, false_negatives=false_negatives))
