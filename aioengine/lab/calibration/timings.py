"""Turns the records of a probe into parts of a cost model."""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence

from aioengine.lab.calibration.fit import fit_line
from aioengine.lab.calibration.probe import ProbedMove, ProbedStep
from aioengine.lab.costs.model import CostModel
from aioengine.lab.costs.steps import StepCosts, StepTimes

MAX_SLOWDOWN = 5.0
RARE = 3.0
"""A timing that is longer than this multiple of the median was disturbed by something else."""


def usual_mean(timings: Sequence[float]) -> float:
    """Return the mean without timings of :data:`RARE` length. It is not the median, because a machine's speed
    varies by the second, and what it takes on the whole is asked."""
    most = RARE * statistics.median(timings)
    return statistics.fmean(seconds for seconds in timings if seconds <= most)


class Intervals:
    """The time during which adapters were moved, as intervals that do not touch."""

    def __init__(self, moves: Iterable[ProbedMove]) -> None:
        self._starts: list[float] = []
        self._ends: list[float] = []
        for move in sorted(moves, key=lambda move: move.start):
            if self._ends and move.start <= self._ends[-1]:
                self._ends[-1] = max(self._ends[-1], move.end)
            else:
                self._starts.append(move.start)
                self._ends.append(move.end)

    def overlap(self, step: ProbedStep) -> float:
        """Return the seconds of the step in which something was moved."""
        found = 0.0
        for i in range(bisect_left(self._ends, step.start), len(self._starts)):
            if self._starts[i] >= step.until:
                break
            found += min(self._ends[i], step.until) - max(self._starts[i], step.start)
        return found


def fit_overhead(steps: Iterable[ProbedStep]) -> tuple[float, float]:
    """Fit the time between steps: a constant and a part for each sequence, in seconds. Each number of
    sequences counts with its mean, because errors are relative, and single times may be close to 0."""
    gaps: dict[int, list[float]] = defaultdict(list)
    for step in steps:
        gaps[step.shape.sequences].append(max(step.wall - step.seconds, 0.0))
    return fit_line([(sequences, max(usual_mean(times), 1e-6)) for sequences, times in gaps.items()])


def serving_level(costs: StepCosts, steps: Iterable[ProbedStep]) -> float:
    """Return how many times as long steps of decodes take in serving as ``costs`` has them, which was fitted
    to steps alone: the median over the numbers of sequences, of the means of each."""
    times = StepTimes(costs)
    ratios: dict[int, list[float]] = defaultdict(list)
    for step in steps:
        if not step.shape.prefill_tokens:
            ratios[step.shape.sequences].append(step.seconds / times(step.shape))
    return statistics.median(map(usual_mean, ratios.values())) if ratios else 1.0


def move_points(moves: Iterable[ProbedMove], stage: str) -> list[tuple[float, float]]:
    """Return (bytes, median seconds) for each size."""
    sizes: dict[int, list[float]] = defaultdict(list)
    for move in moves:
        if move.stage == stage:
            sizes[move.nbytes].append(move.end - move.start)
    return [(nbytes, max(statistics.median(times), 1e-9)) for nbytes, times in sizes.items()]


def slowdown(costs: CostModel, steps: Sequence[ProbedStep], moves: Iterable[ProbedMove], stage: str) -> float:
    """Return how many times as long steps take while adapters are moved in this stage: from steps some of
    which moves overlap.

    A step of s seconds that is disturbed for o of the w seconds that it takes in the end has
    w = s + o (1 - 1 / slowdown).
    """
    moves = list(moves)
    moving = Intervals(move for move in moves if move.stage == stage)
    others = Intervals(move for move in moves if move.stage != stage)
    step_seconds = StepTimes(costs.steps)
    counted = [step for step in steps if not others.overlap(step)]
    expected = [step_seconds(step.shape) + costs.step_overhead for step in counted]
    overlaps = [moving.overlap(step) for step in counted]
    calm = [step.wall / e for step, e, o in zip(counted, expected, overlaps, strict=True) if o == 0]
    disturbed = sum(overlaps)
    if not calm or not disturbed:
        return 1.0
    level = statistics.median(calm)  # these steps may all be somewhat off the fit
    extra = sum(step.wall - level * e for step, e, o in zip(counted, expected, overlaps, strict=True) if o)
    share = min(max(extra / disturbed, 0.0), 1 - 1 / MAX_SLOWDOWN)
    return 1 / (1 - share)
