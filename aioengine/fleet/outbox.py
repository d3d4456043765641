"""A replica's side of the channel to one door: the door's requests, and their new output."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress

from aioengine.fleet.wire import Delta
from aioengine.runtime.tasks import end_tasks


class Outbox:
    """Gathers deltas until the channel takes them, so that all deltas of one step are in one frame."""

    def __init__(self) -> None:
        self.received = 0
        """Number of requests from the door so far."""
        self.ended = 0
        self._deltas: list[Delta] = []
        self._filled = asyncio.Event()
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def begin(self, key: int, work: Coroutine[None, None, None]) -> None:
        """Run a request; ``work`` puts its deltas here."""
        self.received += 1
        task = self._tasks[key] = asyncio.get_running_loop().create_task(
            work, name=f"aioengine-request-{key}"
        )
        task.add_done_callback(lambda _: self._end(key))

    def abort(self, key: int) -> None:
        """Abort a request; does nothing if it has ended."""
        task = self._tasks.get(key)
        if task is not None:
            task.cancel()

    def put(self, delta: Delta) -> None:
        self._deltas.append(delta)
        self._filled.set()

    def wake(self) -> None:
        """Have the channel send a frame although there is no delta."""
        self._filled.set()

    def take(self) -> list[Delta]:
        self._filled.clear()
        deltas, self._deltas = self._deltas, []
        return deltas

    async def filled(self, seconds: float) -> None:
        """Wait until there is a delta, or :meth:`wake` is called, at most ``seconds``."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._filled.wait()

    async def close(self) -> None:
        """Abort all of the door's requests, and wait until they have ended."""
        await end_tasks(self._tasks.values())

    def _end(self, key: int) -> None:
        del self._tasks[key]
        self.ended += 1
