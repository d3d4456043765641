"""A device without a model or adapters, for tests of what is around it."""

from __future__ import annotations

import asyncio
from typing import Any

from aioengine.errors import AdapterLoadError
from aioengine.executors.base import Device
from aioengine.step import LoadedAdapter, Sampled, StepBatch, StepResult


class Steady(Device):
    """Every step takes 10 ms, a copy no time at all; there is nothing to read."""

    async def execute(self, batch: StepBatch) -> StepResult:
        await asyncio.sleep(0.01)
        return StepResult([Sampled(5) if work.sample else None for work in batch.sequences], 0.01)

    async def load(
        self, uid: int, name: str, path: str, retrying: Any, stalled: Any, files: Any = None
    ) -> LoadedAdapter:
        raise AdapterLoadError("not there", name=name, path=path)

    async def place(self, uid: int, slot: int, offset: int) -> float:
        return 0.0

    def drop(self, uid: int) -> None: ...

    async def close(self) -> None: ...
