"""What a calibration times, and that it is timed while nothing else runs."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
import time
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aioengine.lab.calibration.design import Design, Part, Row
from aioengine.lab.calibration.direct_steps import Rounds, Timing
from aioengine.lab.calibration.fit import Timed
from aioengine.lab.calibration.probe import Waits
from aioengine.lab.costs.steps import StepShape

SMALL = StepShape(4, 400, 0, 0, 4)

# Rounds


class Disturbed:
    """Steps of one second each, or as given, beside which others run in the rounds that ``waits`` says."""

    def __init__(self, *waits: float, seconds: Iterator[float] | None = None) -> None:
        self.waits = iter(waits)
        self.seconds = repeat(1.0) if seconds is None else seconds
        self.timed: list[tuple[Row, ...]] = []

    async def time(self, rows: tuple[Row, ...]) -> Timing:
        self.timed.append(rows)
        waited = next(self.waits)
        return Timing(SMALL, next(self.seconds) + waited, waited)


def rounds(
    steps: Disturbed, *, repeats: int, parts: int = 1, seconds: float = 60.0
) -> tuple[Rounds, list[Timed]]:
    timing = Rounds(
        [Part(str(i), (Row(i + 1, 0),)) for i in range(parts)], repeats=repeats, seconds=seconds, seed=0
    )

    async def run() -> None:
        while timing.goes_on:
            await timing.run(steps, lambda what: None)  # type: ignore[arg-type]

    asyncio.run(run())
    return timing, timing.points()


def test_what_others_disturb_is_timed_again() -> None:
    steps = Disturbed(0.01, 0.5, 0.0, 0.9, 0.02)
    timing, points = rounds(steps, repeats=3)
    assert len(steps.timed) == 5 and timing.disturbed == 2
    assert points == [Timed(SMALL, 1.01)]


def test_if_others_always_disturb_the_calmest_counts() -> None:
    steps = Disturbed(0.5, 0.3, 0.4, 0.9, 0.8, 0.7)
    assert rounds(steps, repeats=2)[1] == [Timed(SMALL, 1.3)]
    assert not [*steps.waits]


@given(st.lists(st.floats(0.8, 1.3), min_size=2, max_size=6), st.integers(1, 4))
def test_the_machine_may_be_faster_in_one_round_than_in_another(paces: list[float], parts: int) -> None:
    """A point is the mean over all rounds, and each round's pace can be told."""
    steps = Disturbed(*[0.0] * parts * len(paces), seconds=(pace for pace in paces for _ in range(parts)))
    timing, points = rounds(steps, repeats=len(paces), parts=parts)
    mean = fmean(paces)
    assert [point.seconds for point in points] == [pytest.approx(mean)] * parts
    assert timing.paces() == pytest.approx([pace / mean for pace in paces])


def test_a_timing_far_from_the_others_does_not_count() -> None:
    steps = Disturbed(*[0.0] * 5, seconds=iter([1.0, 9.0, 1.2, 1.1, 1.3]))
    assert rounds(steps, repeats=5)[1] == [Timed(SMALL, pytest.approx(1.15))]


def test_every_round_is_in_another_order_and_time_is_bounded() -> None:
    steps = Disturbed(*[0.0] * 40)
    rounds(steps, repeats=4, parts=10)
    orders = {tuple(steps.timed[i : i + 10]) for i in range(0, 40, 10)}
    assert len(orders) == 4 and len({frozenset(order) for order in orders}) == 1
    once = Disturbed(*[0.0] * 40)
    rounds(once, repeats=4, parts=10, seconds=1e-9)
    assert len(once.timed) == 10


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="only Linux counts this")
def test_waits_count_threads_that_have_no_processor() -> None:
    mine = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(mine)})  # threads that are made now have but one
        waits, stop = Waits(), threading.Event()
        busy = [threading.Thread(target=_hash_until, args=(stop,)) for _ in range(2)]
        for thread in busy:
            thread.start()
        until = time.monotonic() + 60
        while (waited := waits.seconds()) <= 0.05 and time.monotonic() < until:
            time.sleep(0.01)
        stop.set()
        for thread in busy:
            thread.join()
    finally:
        os.sched_setaffinity(0, mine)
    assert waited > 0.05


def _hash_until(stop: threading.Event) -> None:
    """Without the GIL."""
    data = bytes(2**20)
    while not stop.is_set():
        hashlib.sha256(data)


# What is timed


def test_the_design_keeps_to_its_limits() -> None:
    design = Design()
    parts = design.parts(1024)
    ranks = {name: rank for rank in design.ranks for name in design.names(rank)}
    mixes = 0
    for part in parts:
        assert sum(row.tokens for row in part.rows) <= design.max_num_batched_tokens
        assert sum(row.start + row.tokens for row in part.rows) <= design.tokens
        assert max(row.start + row.tokens for row in part.rows) <= 1024
        assert len(part.rows) <= design.max_rows
        used = {row.adapter for row in part.rows if row.adapter}
        mixes += len({ranks[name] for name in used}) > 1
    assert 0 < mixes < len(parts), "some batches have adapters of several ranks"
    assert design.parts(1024) == parts, "and is the same every time"
    assert {
        rank for part in parts for row in part.rows if row.adapter for rank in [ranks[row.adapter]]
    } == set(design.ranks)
    mixed = [part for part in parts if len({row.tokens > 1 for row in part.rows}) == 2]
    assert len(mixed) > 40 and any(row.adapter for part in mixed for row in part.rows)
