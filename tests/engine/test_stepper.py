"""The engine loop by itself, in virtual time: no model, no files, no threads."""

from __future__ import annotations

import asyncio
import math

import pytest
from support.steady_device import Steady, add, run

from aioengine.lab.simulation.clock import NothingToWaitFor
from aioengine.runtime.loop import EngineLoop
from aioengine.schedulers import Decision, SchedulerPolicy, SchedulerView
from aioengine.schedulers.policies.fcfs import FCFS
from aioengine.schedulers.policy import Location
from aioengine.step import LoadedAdapter, ReadOrder


class HoldsBack(FCFS):
    """Reads adapters at once, and places each only when a request has waited a second for it."""

    def schedule(self, view: SchedulerView) -> Decision:
        decision = super().schedule(view)
        since = {place.adapter: view.adapters[place.adapter].oldest_arrival for place in decision.place}
        due = {name for name, arrival in since.items() if arrival is not None and view.now >= arrival + 1}
        return decision._replace(
            place=[place for place in decision.place if place.adapter in due],
            prefetch=[*decision.prefetch, *(name for name in since if name not in due)],
        )


def test_a_policy_that_waits_is_asked_again_although_a_read_has_just_ended() -> None:
    class Reads(Steady):
        async def load(self, order: ReadOrder) -> LoadedAdapter:
            await asyncio.sleep(0.2)
            return LoadedAdapter(4, 100, 100, "digest", 0.2)

    async def main(stepper: EngineLoop) -> None:
        add(stepper, "r", "a")
        await asyncio.sleep(0.99)
        assert stepper.core.residency.current["a"].location is Location.CPU
        await asyncio.sleep(0.16)
        assert not stepper.core.requests

    run(HoldsBack(), main, Reads())


class Asks(SchedulerPolicy):
    """Notes when it is asked, and names a time ``after`` seconds later; admits from the third time on."""

    def __init__(self, after: float) -> None:
        self.after = after
        self.asked: list[float] = []

    def schedule(self, view: SchedulerView) -> Decision:
        self.asked.append(view.now)
        waiting = [request.request_id for request in view.waiting]
        return Decision(admit=waiting[: len(self.asked) // 3], ask_again=view.now + self.after)


@pytest.mark.parametrize("after", [0.01, 0.2])
def test_an_idle_engine_asks_at_the_time_that_was_named(after: float) -> None:
    policy = Asks(after)

    async def main(stepper: EngineLoop) -> None:
        add(stepper, "r")
        await stepper.until(lambda: not stepper.core.requests)

    run(policy, main, Steady())
    assert policy.asked[:3] == pytest.approx([0.0, after, 2 * after])


def test_a_time_counts_also_while_nothing_waits() -> None:
    policy = Asks(0.5)
    run(policy, lambda stepper: asyncio.sleep(2.1), Steady())
    assert policy.asked == pytest.approx([0.0, 0.5, 1.0, 1.5, 2.0])


def test_with_no_time_at_all_nothing_is_waited_for() -> None:
    policy = Asks(math.inf)

    async def main(stepper: EngineLoop) -> None:
        add(stepper, "r")
        await stepper.until(lambda: not stepper.core.requests)

    with pytest.raises(NothingToWaitFor):
        run(policy, main, Steady())
