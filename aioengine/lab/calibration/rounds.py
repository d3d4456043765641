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
from aioengine.lab.calibration.timings import usual_mean

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
        self._rounds: list[list[tuple[int, Timing]]] = []
        """Part and timing of those that count, in each round."""
        self._until: float | None = None

    @property
    def done(self) -> int:
        """Number of timings that count, of ``len(parts) * repeats``."""
        return sum(min(self._calm(i), self._repeats) for i in range(len(self._parts)))

    @property
    def goes_on(self) -> bool:
        """Whether another round is needed, and there is time for it."""
        if self._until is None:
            return True
        in_time = len(self._rounds) < self._repeats * TRIES and time.monotonic() <= self._until
        return in_time and self.done < len(self._parts) * self._repeats

    async def run(self, steps: DirectSteps, tell: Callable[[str], None]) -> None:
        """Run one round. ``tell`` is called before each timing, with what is timed."""
        if self._until is None:
            self._until = time.monotonic() + self._seconds
        order = [i for i in range(len(self._parts)) if self._calm(i) < self._repeats]
        self._random.shuffle(order)
        counting = []
        for i in order:
            part = self._parts[i]
            tell(part.what)
            timing = await steps.time(part.rows)
            self._timings[i].append(timing)
            if _is_calm(timing):
                counting.append((i, timing))
            else:
                self.disturbed += 1
        self._rounds.append(counting)

    def points(self) -> list[Timed]:
        """Return one point for each part."""
        return [self._point(timings) for timings in self._timings]

    def paces(self) -> list[float]:
        """Return how many times as long the steps of each round took as in all rounds, which tells how much
        the machine's speed varied. Rounds that only made a few timings again are left out."""
        usual = [point.seconds for point in self.points()]
        ratios = [[timing.seconds / usual[i] for i, timing in found] for found in self._rounds]
        return [statistics.fmean(found) for found in ratios if found and 2 * len(found) >= len(usual)]

    def _calm(self, i: int) -> int:
        return sum(map(_is_calm, self._timings[i]))

    def _point(self, timings: list[Timing]) -> Timed:
        """Return the mean of those that count; if none does, the one that was disturbed the least."""
        counting = [timing for timing in timings if _is_calm(timing)]
        if not counting:
            counting = [min(timings, key=_share)]
        return Timed(counting[0].shape, usual_mean([timing.seconds for timing in counting]))


def _share(timing: Timing) -> float:
    return timing.waited / max(timing.seconds, 1e-9)


def _is_calm(timing: Timing) -> bool:
    return is_calm(timing.waited, timing.seconds)
