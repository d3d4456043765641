"""Statistics over several seeds: means, intervals, paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95
BOOTSTRAP_FROM = 5
"""Seeds."""


class Estimate(NamedTuple):
    """A mean over seeds, with its 95% confidence interval."""

    mean: float
    low: float | None
    """None with ``high``: one value has no spread."""
    high: float | None
    runs: int


def estimate(values: Sequence[float]) -> Estimate:
    """Compute the mean and its 95% Student's t interval. Raises ValueError if there are no values."""
    count = len(values)
    if not count:
        raise ValueError("no values")
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, None, None, count)
    from scipy.special import stdtrit

    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    half = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2)) * math.sqrt(variance / count)
    return Estimate(mean, mean - half, mean + half, count)


def paired(values: Sequence[float | None], others: Sequence[float | None]) -> Estimate | None:
    """Estimate the differences ``values - others``, seed by seed. The arrivals of a seed are the same on both
    sides and cancel out, so that fewer seeds are needed. None if no seed has both.

    With at least :data:`BOOTSTRAP_FROM` seeds the interval is a bootstrap interval (BCa: Efron, "Better
    Bootstrap Confidence Intervals", 1987), which does not assume a normal distribution. It resamples with a
    fixed seed, so the same values give the same interval. With fewer seeds it would be too narrow, and
    Student's t is used.
    """
    both = [a - b for a, b in zip(values, others, strict=True) if a is not None and b is not None]
    if len(both) < BOOTSTRAP_FROM or max(both) - min(both) <= 1e-9 * max(map(abs, both)):
        return estimate(both) if both else None
    from scipy.stats import bootstrap

    found = bootstrap((both,), np.mean, confidence_level=CONFIDENCE, rng=0).confidence_interval
    return Estimate(math.fsum(both) / len(both), float(found.low), float(found.high), len(both))
