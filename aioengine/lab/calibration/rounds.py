"""Times steps in rounds, until each has been timed often enough while nothing else ran."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence

from aioengine.lab.calibration.design import Part
from aioengine.lab.calibration.direct_steps import DirectSteps, Timing
from aioengine.lab.calibration.fit import Timed
from aioengine.lab.calibration.processor_waits import is_calm

TRIES = 3
"""Maximum rounds, as a multiple of the needed ones, because other programs may disturb some."""


class Rounds:
    """Rounds of timings. Each round times every part that still needs it once, in another order, so that
    neither a drift of the machine's speed nor cache contents of another step look like an effect."""

    def __init__(self, parts: Sequence[Part], *, repeats: int, seconds: float, seed: int) -> None:
        self.disturbed = 0
        """Number of timings that do not count."""
        self._parts = parts
        self._repeats = repeats
        self._seconds = seconds
        self._random = random.Random(seed)
        self._timings: list[list[Timing]] = [[] for _ in parts]

    async def run(self, steps: DirectSteps, tell: Callable[[int, str], None]) -> list[Timed]:
        """Return one point for each part. ``tell`` is called for each timing, with the number of timings
        done, of ``len(parts) * repeats``, and the next one."""
        until = time.monotonic() + self._seconds
        for round_ in range(self._repeats * TRIES):
            order = [i for i in range(len(self._parts)) if self._calm(i) < self._repeats]
            if not order or (round_ > 0 and time.monotonic() > until):
                break
            self._random.shuffle(order)
            for i in order:
                part = self._parts[i]
                tell(sum(min(self._calm(j), self._repeats) for j in range(len(self._parts))), part.what)
                timing = await steps.time(part.rows)
                self._timings[i].append(timing)
                self.disturbed += not _is_calm(timing)
        return [self._point(timings) for timings in self._timings]

    def _calm(self, i: int) -> int:
        return sum(map(_is_calm, self._timings[i]))

    def _point(self, timings: list[Timing]) -> Timed:
        """Return the median of those that count; if none does, the one that was disturbed the least."""
        counting = [timing for timing in timings if _is_calm(timing)]
        if not counting:
            counting = [min(timings, key=_share)]
        return Timed(counting[0].shape, statistics.median(timing.seconds for timing in counting))


def _share(timing: Timing) -> float:
    return timing.waited / max(timing.seconds, 1e-9)


def _is_calm(timing: Timing) -> bool:
    return is_calm(timing.waited, timing.seconds)
