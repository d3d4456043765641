"""What the step loop measures: gaps between tokens, decisions, and the loop's lag."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter

from support.steady_device import Steady

from aioengine.core import Core
from aioengine.events import Event, LoopLag, TokenInterval
from aioengine.runtime.loop import EngineLoop
from aioengine.schedulers import Decision, SchedulerView
from aioengine.schedulers.policies.fcfs import FCFS
from aioengine.testing import LIMITS, Sim


class Holding(FCFS):
    """Lets everybody run but one."""

    held: str | None = None

    def schedule(self, view: SchedulerView) -> Decision:
        decision = super().schedule(view)
        admit = [request_id for request_id in decision.admit if request_id != self.held]
        running = [request.request_id for request in view.running if request.request_id == self.held]
        return Decision(admit=admit, place=decision.place, prefetch=decision.prefetch, preempt=running)


def sim_with(*adapters: str, policy: FCFS | None = None) -> Sim:
    limits = LIMITS._replace(num_blocks=400, max_num_seqs=200, max_num_batched_tokens=400)
    sim = Sim(limits, policy)
    for name in adapters:
        sim.register(name)
        sim.add(name)
    sim.run()  # the adapters are in slots after it
    sim.now = 0.0
    return sim


def step(sim: Sim, now: float) -> Counter[TokenInterval]:
    """A step that ends at ``now``: the intervals by adapter and seconds, however they are split up."""
    sim.schedule()
    sim.now = now
    sim.finish_step()
    found: Counter[TokenInterval] = Counter()
    for interval in sim.intervals:
        found[interval._replace(tokens=0)] += interval.tokens
    return found


def test_gaps_are_each_requests_own() -> None:
    policy = Holding()
    sim = sim_with("a", "b", policy=policy)
    sim.add(max_tokens=3)
    a1 = sim.add("a", max_tokens=9)
    assert step(sim, 1.0) == {}  # the first tokens come after nothing
    sim.add("a", max_tokens=9)
    assert step(sim, 2.0) == {TokenInterval(None, 1.0, 0): 1, TokenInterval("a", 1.0, 0): 1}
    policy.held = a1.id
    sim.add("b", max_tokens=9)
    assert step(sim, 4.0) == {TokenInterval(None, 2.0, 0): 1, TokenInterval("a", 2.0, 0): 1}
    policy.held = None
    assert step(sim, 5.0) == {
        TokenInterval("a", 3.0, 0): 1,
        TokenInterval("a", 1.0, 0): 1,
        TokenInterval("b", 1.0, 0): 1,
    }


def test_equal_gaps_come_as_one_interval() -> None:
    sim = sim_with("a", "b")
    for name in ["a"] * 50 + ["b"] * 50:
        sim.add(name, prompt=[7])
    step(sim, 1.0)
    step(sim, 1.5)
    assert set(sim.intervals) == {TokenInterval("a", 0.5, 50), TokenInterval("b", 0.5, 50)}
    assert len(sim.intervals) == 2


async def test_loop_lag_is_what_a_blocked_loop_was_late_by() -> None:
    found: list[float] = []
    measured = asyncio.Event()

    def heard(event: Event) -> None:
        assert isinstance(event, LoopLag)
        found.append(event.seconds)
        measured.set()

    loop = EngineLoop(Core(LIMITS, FCFS()), Steady())
    loop.listeners.add(heard, LoopLag)
    tasks = asyncio.all_tasks()
    loop.start()
    await asyncio.sleep(0)
    threading.Event().wait(0.4)  # on purpose: it blocks the loop past the time that is due, 0.25 s
    async with asyncio.timeout(60):
        await measured.wait()
    await loop.stop()
    assert 0.1 < found[0] < 5
    assert asyncio.all_tasks() == tasks
