"""What the simulation has found and its quick seeds do not show, as small as it goes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from simulation.scenario import GuardedLoop
from support.lab_sim import MB, config, costs

from aioengine.errors import (
    AdapterLoadError,
    AdapterTooLarge,
    EngineDead,
    EngineStopped,
)
from aioengine.executors.base import Ended
from aioengine.lab.simulation.clock import run_in_virtual_time
from aioengine.lab.simulation.engine import SimulatedEngine
from aioengine.lab.workload.requests import AdapterShape
from aioengine.schedulers import Prefetch, SchedulerView, compose
from aioengine.step import StepBatch


def ends_with(first: str, then: str, end: str) -> list[Any]:
    """What comes of two operations on one adapter, the second of which waits for the first, when the engine
    ends meanwhile."""

    async def main() -> list[Any]:
        engine = SimulatedEngine(config(), costs())
        await engine.start()
        engine.add_adapters([AdapterShape("a", 8, 50 * MB)])
        operations = {
            "load": lambda: engine.load_adapter("a"),
            "replace": lambda: engine.load_adapter("a", "/elsewhere", replace=True),
            "pin": lambda: engine.pin_adapter("a"),
        }
        tasks = [asyncio.create_task(operations[kind]()) for kind in (first, then)]
        await asyncio.sleep(0.1)  # the read takes a second
        if end == "dies":

            def fail(batch: StepBatch, ended: Ended) -> None:
                asyncio.get_running_loop().call_soon(ended, RuntimeError("planned"))

            engine._device.begin = fail  # type: ignore[method-assign]
            with pytest.raises(EngineDead):
                await engine.complete([0, 0])
        else:
            await engine.stop()
        async with asyncio.timeout(60):
            results = await asyncio.gather(*tasks, return_exceptions=True)
        await engine.stop()
        return results

    return run_in_virtual_time(main())


class ReadAll(Prefetch):
    """Reads every adapter, although nobody waits for it."""

    def choose(self, view: SchedulerView, cold: Iterator[str]) -> Sequence[str]:
        return [name for name, adapter in view.adapters.items() if adapter.location == "DISK"]


def test_what_cannot_be_read_is_not_read_ahead() -> None:
    """A policy that reads ahead had a missing adapter read again and again, and the loop did nothing else."""

    async def main() -> list[int]:
        async with SimulatedEngine(config(), costs(), compose(prefetch=ReadAll())) as engine:
            engine.register_adapter("missing", "/missing")  # of which the device knows nothing
            failures = []
            for _ in range(2):
                with pytest.raises(AdapterLoadError):
                    await engine.complete([0], adapter="missing")
                await asyncio.sleep(30)
                failures.append(engine.stats().load_failures)
            return failures

    with asyncio.Runner(loop_factory=GuardedLoop) as runner:
        assert runner.run(main()) == [1, 2]


@pytest.mark.parametrize("end", ["dies", "stops"])
@pytest.mark.parametrize("then", ["load", "replace", "pin"])
@pytest.mark.parametrize("first", ["load", "replace", "pin"])
def test_what_waits_for_an_adapters_lock_hears_of_the_engines_end(first: str, then: str, end: str) -> None:
    """They were waited for for ever: whoever got the lock after the end asked for a read that nobody did."""
    error = EngineStopped if end == "stops" else EngineDead
    assert [type(result) for result in ends_with(first, then, end)] == [error, error]


@pytest.mark.parametrize("stop", [False, True])
def test_an_unload_does_not_wait_for_a_copy_that_was_lost_with_the_device(stop: bool) -> None:
    """It waited for ever, for nobody reported the copy's end."""

    async def main() -> None:
        engine = SimulatedEngine(config(), costs())
        await engine.start()
        engine.add_adapters([AdapterShape("a", 8, 50 * MB)])
        lost = EngineDead("planned: the device was lost")

        async def place(uid: int, slot: int, offset: int) -> float:
            await asyncio.sleep(5.0)
            raise lost

        engine._device.place = place  # type: ignore[method-assign]
        request = asyncio.create_task(engine.complete([0], adapter="a"))
        await asyncio.sleep(3.0)
        unload = asyncio.create_task(engine.unload_adapter("a", force=True))
        await asyncio.sleep(0.1)
        if stop:
            await engine.stop()
        else:
            engine._loop._device_lost(lost)
        async with asyncio.timeout(60):
            await unload
        assert engine.state == ("stopped" if stop else "dead")
        assert (await request).finish_reason == "abort"
        await engine.stop()

    run_in_virtual_time(main())


@pytest.mark.parametrize("order", ["one by one", "at once"])
def test_a_pin_that_has_no_room_beside_the_others_fails(order: str) -> None:
    """It was waited for for ever: pins were counted by their number, and slots share their memory."""

    async def main() -> tuple[list[Any], list[bool]]:
        settings = config(max_loras=3, max_cpu_loras=3, slot_memory=100_000, max_cpu_lora_bytes=300_000)
        async with SimulatedEngine(settings, costs()) as engine:
            engine.add_adapters([AdapterShape(name, 8, 60_000) for name in "ab"])
            async with asyncio.timeout(60):
                if order == "one by one":
                    await engine.pin_adapter("a")
                pins = [engine.pin_adapter(name) for name in "ab"]
                ends = await asyncio.gather(*pins, return_exceptions=True)
                await engine.unpin_adapter("a")
                await engine.pin_adapter("b")
            return ends, [info.pinned for info in engine.adapters()]

    ends, pinned = run_in_virtual_time(main())
    assert isinstance(ends[1], AdapterTooLarge) and "40,000 bytes" not in str(ends[0])
    assert "60,000 bytes" in str(ends[1]) and "slot_memory" in str(ends[1])
    assert pinned == [False, True], "and it can be pinned as soon as there is room"
