"""The simulated device: what it takes for steps, reads and copies, alone and at once."""

from __future__ import annotations

import asyncio
from fractions import Fraction
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.lab_sim import DISK, MB, SLOT, STEP, config, costs

from aioengine import SamplingParams
from aioengine.errors import AdapterLoadError, AdapterTooLarge, RequestInvalid
from aioengine.events import Event, PolicyOverran, StepFinished
from aioengine.executors.base import run_step
from aioengine.lab.costs.model import Stage
from aioengine.lab.costs.steps import StepCosts
from aioengine.lab.simulation.clock import run_in_virtual_time
from aioengine.lab.simulation.device import SimulatedDevice
from aioengine.lab.simulation.engine import SimulatedEngine
from aioengine.lab.simulation.transfers import SharedStage
from aioengine.lab.workload.requests import AdapterShape
from aioengine.step import StepBatch

# Transfers


def ends_of(stage: Stage, transfers: list[tuple[float, float]]) -> list[float]:
    """When each transfer (start, bytes) ends."""

    async def one(shared: SharedStage, start: float, nbytes: float) -> float:
        await asyncio.sleep(start)
        await shared.transfer(nbytes)
        return asyncio.get_running_loop().time()

    async def main() -> list[float]:
        shared = SharedStage(stage)
        return await asyncio.gather(*(one(shared, *transfer) for transfer in transfers))

    return run_in_virtual_time(main())


def test_a_transfer_alone() -> None:
    assert ends_of(Stage(0.5, 100.0), [(1.0, 200.0)]) == [pytest.approx(3.5)]
    assert ends_of(Stage(0.5, 100.0), [(1.0, 0.0)]) == [pytest.approx(1.5)]


def by_hand(bandwidth: int, transfers: list[tuple[float, float]]) -> list[float]:
    """Processor sharing from event to event, every transfer's bytes counted for themselves, in fractions."""
    starts = [Fraction(start) for start, _ in transfers]
    left = {index: Fraction(nbytes) for index, (_, nbytes) in enumerate(transfers)}
    ends = [Fraction()] * len(transfers)
    now = Fraction()
    while left:
        here = [index for index in left if starts[index] <= now]
        times = [starts[index] for index in left if starts[index] > now]
        if here:
            times.append(now + min(left[index] for index in here) * len(here) / bandwidth)
        until = min(times)
        for index in here:
            left[index] -= (until - now) * bandwidth / len(here)
            if not left[index]:
                ends[index] = until
                del left[index]
        now = until
    return [float(end) for end in ends]


@given(
    st.lists(
        st.tuples(st.integers(0, 40).map(lambda n: n / 4), st.integers(1, 1000).map(float)),
        min_size=1,
        max_size=8,
    )
)
def test_sharing_is_exact(transfers: list[tuple[float, float]]) -> None:
    assert ends_of(Stage(0.0, 128.0), transfers) == pytest.approx(by_hand(128, transfers))


def test_a_cancelled_transfer_leaves_its_share_to_the_others() -> None:
    async def main() -> float:
        shared = SharedStage(Stage(0.0, 100.0))
        other = asyncio.create_task(shared.transfer(1000.0))
        first = asyncio.create_task(shared.transfer(200.0))
        await asyncio.sleep(1)
        other.cancel()
        await first
        return asyncio.get_running_loop().time()

    assert run_in_virtual_time(main()) == pytest.approx(1 + 150 / 100)


# Steps beside moves


async def work(device: SimulatedDevice) -> float:
    """Return the seconds that a step took."""
    return (await run_step(device, StepBatch(0, [], []))).seconds[0]


def test_work_is_slow_just_while_it_is_disturbed() -> None:
    async def disturb(device: SimulatedDevice) -> None:
        await asyncio.sleep(0.2)
        with device.disturbed(2.0), device.disturbed(1.25):  # the larger counts
            await asyncio.sleep(0.2)
            with device.disturbed(2.0):  # twice is no worse than once
                await asyncio.sleep(0.2)

    async def main() -> tuple[float, float]:
        device = SimulatedDevice(costs(steps=StepCosts(step=1.0)), token=0, end_token=1, max_rank=8)
        beside = asyncio.create_task(disturb(device))
        first = await work(device)
        await beside
        return first, await work(device)

    assert run_in_virtual_time(main()) == (pytest.approx(1.2), pytest.approx(1.0))


# The engine over it

ADAPTERS = [AdapterShape("a", 8, 50 * MB), AdapterShape("b", 8, 50 * MB), AdapterShape("big", 64)]


def on_engine(main: Any, *, model: Any = None, **fields: Any) -> Any:
    async def whole() -> Any:
        async with SimulatedEngine(config(**fields), model or costs()) as engine:
            engine.add_adapters(ADAPTERS)
            return await main(engine)

    return run_in_virtual_time(whole())


def test_what_is_expected_must_be_tokens() -> None:
    async def main(engine: SimulatedEngine) -> None:
        for bad in (0, -3, 2.0, True, "7"):
            with pytest.raises(RequestInvalid, match="expected_tokens="):
                await engine.complete([0], expected_tokens=bad)
        out = await engine.complete([0], SamplingParams(max_tokens=3), expected_tokens=2)
        assert len(out.token_ids) == 3  # it binds nobody

    on_engine(main)


def test_steps_wait_for_the_overhead_and_do_not_report_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SimulatedDevice, "repeats", False)

    async def main(engine: SimulatedEngine) -> list[tuple[float, float]]:
        steps: list[tuple[float, float]] = []

        def listen(event: Event) -> None:
            assert not isinstance(event, PolicyOverran)
            if isinstance(event, StepFinished):
                assert event.schedule_seconds == 0
                steps.append((event.time, event.seconds))

        engine.add_listener(listen)
        await engine.complete([0], SamplingParams(max_tokens=3))
        return steps

    found = on_engine(main, model=costs(step_overhead=0.002))
    assert found == [(pytest.approx(0.012 * n), pytest.approx(STEP)) for n in (1, 2, 3)]


def test_loads_and_copies_slow_the_steps_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SimulatedDevice, "repeats", False)

    async def main(engine: SimulatedEngine) -> list[float]:
        steps: list[float] = []
        engine.add_listener(lambda event: isinstance(event, StepFinished) and steps.append(event.seconds))
        async with asyncio.TaskGroup() as group:
            group.create_task(engine.complete([0], SamplingParams(max_tokens=150)))
            group.create_task(engine.pin_adapter("a"))
        return steps

    slow = costs(
        disk=msgspec.structs.replace(DISK, slowdown=1.5), slot=msgspec.structs.replace(SLOT, slowdown=3.0)
    )
    steps = on_engine(main, model=slow)
    # The read takes 1 s, that is 66 2/3 steps of 15 ms; then the copy 0.3 s, about 10 of 30 ms.
    assert steps[:66] == pytest.approx([1.5 * STEP] * 66)
    assert steps[67:76] == pytest.approx([3.0 * STEP] * 9)
    assert steps[80:] == pytest.approx([STEP] * 70)


def test_errors_of_adapters_are_the_real_ones() -> None:
    async def main(engine: SimulatedEngine) -> None:
        with pytest.raises(AdapterTooLarge, match="rank 64 is above max_lora_rank=16"):
            await engine.complete([0], adapter="big")
        engine.register_adapter("stranger", "/nowhere")
        with pytest.raises(AdapterLoadError, match="no adapter of this name"):
            await engine.complete([0], adapter="stranger")
        await engine.complete([0], adapter="a")
        engine.check_invariants()

    on_engine(main)
