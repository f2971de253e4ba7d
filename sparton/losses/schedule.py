"""The weight of a regulariser as a function of the global step."""

from __future__ import annotations

import math

SHAPES = {"quadratic": 2, "linear": 1}


class WarmupWeight:
    """A weight that rises from 0 to its full value over a warm-up and stays there.

    ``weight * min(1, step / T) ** p`` with p = 2 (quadratic: Paria et al., arXiv 2004.05665, and SPLADE) or
    p = 1 (linear). A pure function of the global step: it holds no counter, so that a resumed run continues exactly.

    Args:
        weight: the full value, >= 0.
        warmup: T as a number of steps (int), or as a fraction of the run (float in [0, 1]); 0 means no warm-up.
        shape: "quadratic" or "linear".

    Raises:
        ValueError: for a weight, warm-up or shape outside of these.
    """

    def __init__(self, weight: float, warmup: int | float = 0, shape: str = "quadratic") -> None:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
            raise ValueError(f"weight must be a finite number >= 0, got {weight!r}; use for example 1e-3")
        is_steps = isinstance(warmup, int) and not isinstance(warmup, bool) and warmup >= 0
        is_fraction = isinstance(warmup, float) and 0.0 <= warmup <= 1.0
        if not (is_steps or is_fraction):
            raise ValueError(
                f"warmup must be an int of steps >= 0 or a float fraction in [0, 1], got {warmup!r}; "
                "use for example 1000 or 0.33"
            )
        if shape not in SHAPES:
            raise ValueError(f"shape must be one of {sorted(SHAPES)}, got {shape!r}; use shape=quadratic")
        self.weight = float(weight)
        self.warmup = warmup
        self.shape = shape

    def at(self, step: int, total_steps: int) -> float:
        """Returns the weight at a global step.

        Args:
            step: optimizer steps done so far, from 0.
            total_steps: optimizer steps of the whole run; only a fractional warm-up looks at it.

        Raises:
            ValueError: for a fractional warm-up of a run whose length is not known.
        """
        length = self.warmup
        if isinstance(length, float):
            if not 0 < total_steps < math.inf:
                raise ValueError(
                    f"total_steps must be known for a fractional warmup ({length}), got {total_steps}; "
                    "set trainer.max_steps, or give warmup as an int of steps"
                )
            length = round(length * total_steps)
        if step >= length:
            return self.weight
        return self.weight * (max(step, 0) / length) ** SHAPES[self.shape]

    def __repr__(self) -> str:
        return f"WarmupWeight(weight={self.weight}, warmup={self.warmup}, shape={self.shape!r})"
