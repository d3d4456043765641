"""Random draws that are the same on every machine: each aspect of a workload has a separate stream.

Of :class:`random.Random` only ``random()`` is used: it is the one method whose sequence Python promises to
keep between versions.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from hashlib import blake2b
from itertools import accumulate
from math import cos, exp, log, pi, sqrt
from random import Random


def stream(seed: int, aspect: str) -> Random:
    """Return the stream of ``aspect``, which does not depend on draws from other streams."""
    return Random(stable_number(f"{seed}/{aspect}"))


def stable_number(text: str) -> int:
    """Return a number below 2**128 for a text, the same in every process."""
    return int.from_bytes(blake2b(text.encode(), digest_size=16).digest(), "big")


def exponential(rng: Random) -> float:
    """Draw from the exponential distribution of mean 1."""
    return -log(1.0 - rng.random())


def normal(rng: Random) -> float:
    """Draw from the normal distribution of mean 0 and deviation 1 (Box and Muller, 1958, one of the two);
    always two draws."""
    radius = sqrt(-2.0 * log(1.0 - rng.random()))
    return radius * cos(2.0 * pi * rng.random())


def gamma(rng: Random, shape: float) -> float:
    """Draw from the Gamma distribution of scale 1, whose mean is ``shape`` (Marsaglia and Tsang, 2000)."""
    if shape < 1.0:
        # Their method is for shapes >= 1; this extends it to smaller ones.
        return gamma(rng, shape + 1.0) * exp(log(1.0 - rng.random()) / shape)
    d = shape - 1.0 / 3.0
    c = 1.0 / sqrt(9.0 * d)
    while True:
        x = normal(rng)
        v = (1.0 + c * x) ** 3
        if v > 0.0 and log(1.0 - rng.random()) < 0.5 * x * x + d - d * v + d * log(v):
            return d * v


def shuffle(rng: Random, items: list[int]) -> None:
    """Shuffle a list in place (Fisher and Yates)."""
    for last in range(len(items) - 1, 0, -1):
        other = int(rng.random() * (last + 1))
        items[last], items[other] = items[other], items[last]


def log_normal(rng: Random, median: float, sigma: float) -> float:
    """Draw from a lognormal distribution; ``sigma`` is the deviation of the logarithm."""
    return median * exp(sigma * normal(rng))


class Weighted:
    """Draws an index with a probability proportional to its weight. Weights are >= 0, and not all are 0."""

    def __init__(self, weights: Sequence[float]) -> None:
        self._bounds = list(accumulate(weights))

    def draw(self, rng: Random) -> int:
        """Draw an index, in logarithmic time."""
        found = bisect_right(self._bounds, rng.random() * self._bounds[-1])
        return min(found, len(self._bounds) - 1)
