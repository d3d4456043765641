"""What the step loop measures: gaps between tokens, decisions, and the loop's lag."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter

from support.core_sim import CoreSim

from aioengine.core.state import Request
from aioengine.events import TokenInterval
from aioengine.runtime.intervals import LoopLagMeter, TokenIntervals


def requests(*adapters: str | None) -> list[Request]:
    sim = CoreSim()
    for name in {name for name in adapters if name is not None}:
        sim.register(name)
    return [sim.add(name) for name in adapters]


def step(intervals: TokenIntervals, now: float, *who: Request) -> Counter[TokenInterval]:
    """Tokens of one step; the intervals by adapter and seconds, however they are split up."""
    for request in who:
        intervals.token(request)
    found: Counter[TokenInterval] = Counter()
    for interval in intervals.take(now):
        found[interval._replace(tokens=0)] += interval.tokens
    return found


def test_gaps_are_each_requests_own() -> None:
    intervals = TokenIntervals()
    base, a1, a2, b = requests(None, "a", "a", "b")
    assert step(intervals, 1.0, base, a1) == {}  # the first tokens come after nothing
    assert step(intervals, 2.0, base, a1, a2) == {
        TokenInterval(None, 1.0, 0): 1,
        TokenInterval("a", 1.0, 0): 1,
    }
    assert step(intervals, 4.0, base, a2, b) == {
        TokenInterval(None, 2.0, 0): 1,
        TokenInterval("a", 2.0, 0): 1,
    }
    # a1 was passed over for a step, as after a preemption.
    assert step(intervals, 5.0, a1, a2, b) == {
        TokenInterval("a", 3.0, 0): 1,
        TokenInterval("a", 1.0, 0): 1,
        TokenInterval("b", 1.0, 0): 1,
    }
    assert step(intervals, 6.0) == {}


def test_equal_gaps_come_as_one_interval() -> None:
    intervals = TokenIntervals()
    many = requests(*["a"] * 50, *["b"] * 50)
    step(intervals, 1.0, *many)
    for request in many:
        intervals.token(request)
    assert intervals.take(1.5) == (TokenInterval("a", 0.5, 50), TokenInterval("b", 0.5, 50))


def test_a_request_id_that_is_used_again_starts_anew() -> None:
    intervals = TokenIntervals()
    (first,), (second,) = requests("a"), requests("a")
    assert first.id == second.id
    step(intervals, 1.0, first)
    assert step(intervals, 9.0, second) == {}


def test_the_same_requests_again_and_again() -> None:
    intervals = TokenIntervals()
    who = requests("a", None, "a")
    step(intervals, 1.0, *who)
    for now in (1.5, 2.5, 4.5):
        gap = {1.5: 0.5, 2.5: 1.0, 4.5: 2.0}[now]
        assert step(intervals, now, *who) == {TokenInterval("a", gap, 0): 2, TokenInterval(None, gap, 0): 1}


async def test_loop_lag_is_what_a_blocked_loop_was_late_by() -> None:
    found: list[float] = []
    measured = asyncio.Event()

    def report(seconds: float) -> None:
        found.append(seconds)
        measured.set()

    meter = LoopLagMeter(report, time.perf_counter)
    tasks = asyncio.all_tasks()
    meter.start()
    threading.Event().wait(0.4)  # on purpose: it blocks the loop past the time that is due, 0.25 s
    async with asyncio.timeout(5):
        await measured.wait()
    meter.stop()
    meter.stop()
    assert 0.1 < found[0] < 5
    assert asyncio.all_tasks() == tasks
