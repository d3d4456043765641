"""Waiting for something to happen to an adapter."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from support.steady_device import Steady

from aioengine.core import Core
from aioengine.errors import EngineDead, EngineStopped
from aioengine.lab.simulation.clock import VirtualTimeLoop
from aioengine.runtime.loop import EngineLoop
from aioengine.schedulers.policies.fcfs import FCFS
from aioengine.testing import LIMITS


def run(main: Callable[[EngineLoop], Awaitable[None]]) -> None:
    async def whole() -> None:
        stepper = EngineLoop(Core(LIMITS, FCFS()), Steady())
        stepper.start()
        await main(stepper)
        await stepper.stop()
        assert not stepper._changed

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(whole())


def test_a_condition_is_asked_at_the_events_of_its_adapter_only() -> None:
    asked: list[str] = []

    def waits_for(name: str, stepper: EngineLoop) -> asyncio.Task[None]:
        def is_registered() -> bool:
            asked.append(name)
            return name in stepper.core.residency.current

        return asyncio.create_task(stepper.until(is_registered, name))

    async def main(stepper: EngineLoop) -> None:
        a, b = waits_for("a", stepper), waits_for("b", stepper)
        await asyncio.sleep(1)
        assert asked == ["a", "b"], "at once, and nobody asks again while nothing happens"
        residency = stepper.core.residency
        residency.names.of("a").register("/a", 0.0)
        stepper.wake()
        await a
        assert asked == ["a", "b", "a"] and not b.done()
        b.cancel()
        await asyncio.wait([b])

    run(main)


@pytest.mark.parametrize("dies", [False, True])
def test_waits_end_with_the_engine(dies: bool) -> None:
    async def main(stepper: EngineLoop) -> None:
        waiting = asyncio.create_task(stepper.until(lambda: False, "a"))
        await asyncio.sleep(0)
        if dies:
            stepper._device_lost(EngineDead("gone"))
        else:
            await stepper.stop()
        with pytest.raises(EngineDead if dies else EngineStopped):
            await waiting
        with pytest.raises(EngineDead if dies else EngineStopped):
            await stepper.until(lambda: False, "a")
        await stepper.until(lambda: True, "a")

    run(main)
