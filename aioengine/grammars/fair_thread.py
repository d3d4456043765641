"""A thread in which tenants take turns."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from aioengine.errors import EngineOverloaded, EngineStopped
from aioengine.grammars.fair_queue import FairQueue
from aioengine.runtime.tasks import end_tasks

T = TypeVar("T")
_Item = tuple[Callable[[], Any], "asyncio.Future[Any]"]


class FairThread:
    """Thread that does short pieces of work one after another. Used on one loop. At most ``most`` pieces of
    one tenant may wait."""

    def __init__(self, name: str, *, most: int) -> None:
        self._most = most
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._queue: FairQueue[_Item] = FairQueue()
        self._pump: asyncio.Task[None] | None = None
        self._is_closed = False

    async def run(self, tenant: str | None, work: Callable[[], T]) -> T:
        """Run ``work()`` in turn. If cancelled before its turn, it is not run. Raises the errors of ``work``,
        EngineOverloaded, EngineStopped."""
        if self._is_closed:
            raise EngineStopped("the engine has stopped")
        if self._queue.count(tenant) >= self._most:
            raise EngineOverloaded(f"already {self._most} schemas wait to be read; try again later")
        loop = asyncio.get_running_loop()
        item = (work, loop.create_future())
        self._queue.put(tenant, item)
        if self._pump is None:
            self._pump = loop.create_task(self._do_all(), name="aioengine-schemas")
        try:
            found: T = await item[1]
            return found
        finally:
            self._queue.discard(tenant, item)

    async def _do_all(self) -> None:
        while True:
            await self._do(*await self._queue.get())

    async def _do(self, work: Callable[[], Any], done: asyncio.Future[Any]) -> None:
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._pool, work)
        except Exception as error:
            if not done.done():
                done.set_exception(error)
        else:
            if not done.done():
                done.set_result(found)
        finally:
            if not done.done():  # this thread is cancelled
                done.set_exception(EngineStopped("the engine was stopped before the schema was read"))

    async def close(self) -> None:
        """Stop; waiting callers get EngineStopped."""
        self._is_closed = True
        if self._pump is not None:
            await end_tasks([self._pump])
        while self._queue:
            _, done = await self._queue.get()
            if not done.done():
                done.set_exception(EngineStopped("the engine was stopped before the schema was read"))
        self._pool.shutdown(wait=False)


async def in_own_thread(work: Callable[[], T]) -> T:
    """Run in a dedicated thread; a cancelled caller does not wait for it."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="aioengine-grammars")
    try:
        return await asyncio.get_running_loop().run_in_executor(pool, work)
    finally:
        pool.shutdown(wait=False)
