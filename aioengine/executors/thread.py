"""The default executor: the model in this process, stepped in a thread of its own.

torch's operators release the GIL while they compute, so the event loop goes on beside a step.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from aioengine.executors.base import Executor
from aioengine.step import StepBatch, StepResult

if TYPE_CHECKING:
    from aioengine.model.runner import ModelRunner
    from aioengine.model.slots.image import AdapterImage


class ThreadExecutor(Executor):
    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self._step_thread = ThreadPoolExecutor(1, thread_name_prefix="aioengine-step")
        self._copy_thread = ThreadPoolExecutor(1, thread_name_prefix="aioengine-copy")

    async def execute(self, batch: StepBatch) -> StepResult:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._step_thread, self.runner.execute, batch)

    async def write_slot(self, slot: int, adapter: AdapterImage) -> float:
        """Copy an adapter from the CPU into a slot that nothing reads; returns the seconds it took."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._copy_thread, self._write_slot, slot, adapter)

    def _write_slot(self, slot: int, adapter: AdapterImage) -> float:
        slots = self.runner.lora_slots
        assert slots is not None, "a slot was written while LoRA is off"
        start = time.perf_counter()
        slots.write(slot, adapter)
        return time.perf_counter() - start

    async def close(self) -> None:
        self._step_thread.shutdown(wait=True)
        self._copy_thread.shutdown(wait=True)
        with contextlib.suppress(AttributeError):  # closed twice
            del self.runner
