"""A device without a model or adapters, for tests of what is around it, and an engine loop over it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from aioengine.core import Core
from aioengine.errors import AdapterLoadError
from aioengine.executors.base import Device, Ended
from aioengine.lab.simulation.clock import VirtualTimeLoop
from aioengine.request import RequestOptions, SamplingParams
from aioengine.runtime.loop import EngineLoop
from aioengine.schedulers import SchedulerPolicy
from aioengine.step import LoadedAdapter, ReadOrder, StepBatch, StepResult
from aioengine.testing import LIMITS


class Steady(Device):
    """Every step takes 10 ms, a copy no time at all; there is nothing to read."""

    def begin(self, batch: StepBatch, ended: Ended) -> None:
        counts = [int(work.sample) for work in batch.sequences]
        result = StepResult([5] * sum(counts), counts, (0.01,))
        asyncio.get_running_loop().call_later(0.01, ended, result)

    async def load(self, order: ReadOrder) -> LoadedAdapter:
        raise AdapterLoadError("not there", name=order.name, path=order.path)

    async def place(self, uid: int, slot: int, offset: int) -> float:
        return 0.0

    def drop(self, uid: int) -> None: ...

    async def close(self) -> None: ...


def run(policy: SchedulerPolicy, main: Callable[[EngineLoop], Awaitable[None]], device: Device) -> None:
    """Run an engine loop in virtual time until ``main`` ends."""

    async def whole() -> None:
        stepper = EngineLoop(Core(LIMITS, policy), device, virtual=True)
        stepper.start()
        await main(stepper)
        stepper.core.residency.check()
        await stepper.stop()

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(whole())


def add(stepper: EngineLoop, request_id: str, adapter: str | None = None, path: str = "/a") -> None:
    """Add a request; an adapter that is not known is at ``path``."""
    names, now = stepper.core.residency.names, asyncio.get_running_loop().time()
    if adapter is not None and adapter not in stepper.core.residency.current:
        names.of(adapter).register(path, now)
    entry = None if adapter is None else stepper.core.residency.current[adapter]
    params = SamplingParams(max_tokens=3)
    stepper.core.add_request(request_id, [3, 4], params, RequestOptions(), now, adapter=entry)
    stepper.wake()
