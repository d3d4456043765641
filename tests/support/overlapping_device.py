"""A device without a model that takes a step while one is in flight."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import Any

from support.steady_device import Steady

from aioengine.step import Sampled, StepBatch, StepResult


class Step:
    def __init__(self, device: Overlapping, batch: StepBatch) -> None:
        self.batch = batch
        self.began = False
        self._task = asyncio.get_running_loop().create_task(self._run(device, device.last))

    async def _run(self, device: Overlapping, before: Step | None) -> StepResult:
        if before is not None:
            await asyncio.wait([before._task])
        self.began = True
        device.begun.append(self.batch)
        await asyncio.sleep(0.01)
        if device.fails_at == self.batch.step:
            raise RuntimeError("the device is broken")
        return StepResult([Sampled(5) if work.sample else None for work in self.batch.sequences], 0.01)

    def __await__(self) -> Generator[Any, None, StepResult]:
        return self._task.__await__()

    def take_back(self) -> bool:
        return not self.began and self._task.cancel()


class Overlapping(Steady):
    """Every step takes 10 ms and begins when the one before has ended."""

    overlaps = True

    def __init__(self) -> None:
        self.begun: list[StepBatch] = []
        self.last: Step | None = None
        self.fails_at: int | None = None

    async def execute(self, batch: StepBatch) -> StepResult:
        return await self.queue(batch)

    def queue(self, batch: StepBatch) -> Step:
        self.last = Step(self, batch)
        return self.last
