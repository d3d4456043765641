"""From what a probe has written down to the points that a cost model is fitted to."""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence

from aioengine.lab.costs import CostModel, StepShape
from aioengine.lab.fit import Timed, fit_line
from aioengine.lab.probe import ProbedMove, ProbedStep

MAX_SLOWDOWN = 5.0


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
        """Seconds of the step in which something was moved."""
        found = 0.0
        for i in range(bisect_left(self._ends, step.start), len(self._starts)):
            if self._starts[i] >= step.until:
                break
            found += min(self._ends[i], step.until) - max(self._starts[i], step.start)
        return found


def fit_overhead(steps: Iterable[ProbedStep]) -> float:
    """Seconds between steps, whatever is in them; what each sequence adds is left to the step's own costs."""
    gaps = [(step.shape.sequences, max(step.wall - step.seconds, 1e-9)) for step in steps]
    return fit_line(gaps)[0]


def step_points(steps: Iterable[ProbedStep], overhead: float) -> list[Timed]:
    """One point for all steps that differ in nothing but the positions that their decode rows read: their
    median time, less the overhead, as far as there was any.

    Rows that have come a factor of two further are another point.
    """
    alike: dict[tuple[int, StepShape], list[ProbedStep]] = defaultdict(list)
    for step in steps:
        far = (step.shape.decode_kv // max(step.shape.decode_rows, 1)).bit_length()
        alike[far, step.shape._replace(decode_kv=0)].append(step)
    points = []
    for (_, shape), group in alike.items():
        seconds = statistics.median(max(step.wall - overhead, step.seconds) for step in group)
        kv = round(statistics.fmean(step.shape.decode_kv for step in group))
        points.append(Timed(shape._replace(decode_kv=kv), seconds))
    return points


def move_points(moves: Iterable[ProbedMove], stage: str) -> list[tuple[float, float]]:
    """(bytes, median seconds) by size."""
    sizes: dict[int, list[float]] = defaultdict(list)
    for move in moves:
        if move.stage == stage:
            sizes[move.nbytes].append(move.end - move.start)
    return [(nbytes, max(statistics.median(times), 1e-9)) for nbytes, times in sizes.items()]


def load_slowdown(costs: CostModel, steps: Sequence[ProbedStep], moving: Intervals) -> float:
    """How many times as long steps take while adapters are moved: from steps some of which moves overlap.

    A step of s seconds that is disturbed for o of the w seconds that it takes in the end has
    w = s + o (1 - 1 / slowdown).
    """
    expected = [costs.step_seconds(step.shape) + costs.step_overhead for step in steps]
    overlaps = [moving.overlap(step) for step in steps]
    calm = [step.wall / seconds for step, seconds, o in zip(steps, expected, overlaps, strict=True) if o == 0]
    disturbed = sum(overlaps)
    if not calm or not disturbed:
        return 1.0
    level = statistics.median(calm)  # these steps may all be somewhat off the fit
    extra = sum(
        step.wall - level * seconds for step, seconds, o in zip(steps, expected, overlaps, strict=True) if o
    )
    share = min(max(extra / disturbed, 0.0), 1 - 1 / MAX_SLOWDOWN)
    return 1 / (1 - share)
