"""A device without a model or adapters, for tests of what is around it."""

from __future__ import annotations

import asyncio

from aioengine.errors import AdapterLoadError
from aioengine.executors.base import Device, Ended
from aioengine.step import LoadedAdapter, ReadOrder, StepBatch, StepResult


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
