"""Whether two heads are equally good, judged by how much the seeds of each differ among themselves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

EQUAL = "equal within the spread of the seeds"
UNDECIDED = "undecided: the seeds spread too widely to tell"
WIDE = 0.1  # of the baseline's mean: where the seeds allow a larger difference, one that they hide is no equality


def compare(baseline: Sequence[float], other: Sequence[float]) -> dict[str, float | str | None]:
    """Difference of the means, how large it may be, and the verdict.

    Equal within the spread of the seeds are means that differ by at most ``allowed``, two pooled standard deviations
    over the seeds: ``2 sqrt((var_baseline + var_other) / 2)`` for as many seeds each, with the sample variance. With
    three seeds that is a little stricter than Student's t-test at the 5% level (2.27 of them).

    Where ``allowed`` is more than ``WIDE`` of the baseline's mean (a seed collapsed, or all of them are bad), a
    difference within it shows nothing: the verdict is that there is none.
    """
    mean = statistics.fmean(baseline)
    difference = statistics.fmean(other) - mean
    if len(baseline) < 2:
        return {"difference": difference, "allowed": None, "verdict": "one seed: no spread to compare with"}
    allowed = 2 * math.sqrt((deviation(baseline) ** 2 + deviation(other) ** 2) / 2)
    if abs(difference) > allowed:
        verdict = f"not {EQUAL}"
    else:
        verdict = EQUAL if allowed <= WIDE * abs(mean) else UNDECIDED
    return {"difference": difference, "allowed": allowed, "verdict": verdict}


def deviation(values: Sequence[float]) -> float | None:
    """The sample standard deviation; None for a single value."""
    return statistics.stdev(values) if len(values) > 1 else None
