"""The default device: the model in this process, stepped in a separate thread.

torch's operators release the GIL while they compute, so the event loop runs during a step.
"""

from __future__ import annotations

import asyncio
import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from aioengine.adapters.loader import BaseLoader, enough_memory
from aioengine.adapters.read_threads import Progress, for_the_loop, start_read
from aioengine.config import LoRAConfig
from aioengine.errors import DeviceError
from aioengine.executors.base import Device, Ended
from aioengine.model.cuda.failures import device_error
from aioengine.step import LoadedAdapter, ReadOrder, StepBatch, StepResult

if TYPE_CHECKING:
    from aioengine.adapters.store import AdapterStore
    from aioengine.model.runner import ModelRunner
    from aioengine.model.slots.image import AdapterImage

STOP_SECONDS = 1.0
"""How long ``close`` waits for reads; they take milliseconds."""


class ThreadDevice(BaseLoader, Device):
    """Steps in one thread, copies into slots in another, and each read in its own, so that a slow disk holds
    up neither the event loop nor a step. ``store`` is the CPU cache."""

    def __init__(
        self, runner: ModelRunner, store: AdapterStore, lora: LoRAConfig | None = None, seed: int = 0
    ) -> None:
        super().__init__(lora, seed)
        self.runner = runner
        self.store = store
        self.kernels, self.variance = runner.kernels, runner.variance
        self._step_thread = ThreadPoolExecutor(1, thread_name_prefix="aioengine-step")
        self._copy_thread = ThreadPoolExecutor(1, thread_name_prefix="aioengine-copy")

    def begin(self, batch: StepBatch, ended: Ended) -> None:
        self._step_thread.submit(self._run, batch, ended, asyncio.get_running_loop())

    def _run(self, batch: StepBatch, ended: Ended, loop: asyncio.AbstractEventLoop) -> None:
        result: StepResult | Exception
        try:
            result = self.runner.execute(batch)
        except BaseException as error:
            result = for_the_loop(device_error(error) or error, "a step")
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(ended, result)

    async def _read(self, order: ReadOrder, progress: Progress) -> LoadedAdapter:
        @enough_memory()
        def read() -> tuple[LoadedAdapter, AdapterImage]:
            try:
                draft = self.store.begin(order.name, order.path, progress, order.files)
                image = self.store.finish(draft)
                return draft.loaded, image  # the digest was computed beside that
            finally:
                progress.running = False

        loaded, self.store.images[order.uid] = await start_read("aioengine-load", read)
        return loaded

    async def place(self, uid: int, slot: int, offset: int) -> float:
        image, loop = self.store.images[uid], asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._copy_thread, self.runner.write, image, slot, offset)
        except DeviceError as error:
            if self.on_loss is not None:  # no step need be in flight that would tell
                self.on_loss(error)
            raise

    def drop(self, uid: int) -> None:
        del self.store.images[uid]

    async def close(self) -> None:
        self._step_thread.shutdown(wait=True)
        self._copy_thread.shutdown(wait=True)
        with contextlib.suppress(AttributeError):  # closed twice
            del self.runner
        await self._end_of_reads(STOP_SECONDS)
        self.store.clear()
