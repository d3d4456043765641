"""Asyncio tasks that nobody may leave behind, and work that several callers share, in turns."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Iterable, Sequence
from typing import Any, Generic, TypeVar
from weakref import WeakValueDictionary

from aioengine.errors import frameless

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


async def run_to_completion(work: Awaitable[T]) -> T:
    """Run ``work``, which would leave threads or processes behind, to completion despite cancellation; raise
    that then, and drop the result."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        await end_tasks([task])
        raise cancelled
    return task.result()


async def together(works: Sequence[Awaitable[T]]) -> list[T]:
    """Run all and return their results, in order. When one fails, or the call is cancelled, the others are
    cancelled and awaited."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await end_tasks(tasks)


async def end_tasks(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """Cancel the tasks that still run, wait for all, and drop their errors."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class Background:
    """Tasks that run until they have ended, or :meth:`end` is called."""

    def __init__(self) -> None:
        self.tasks: set[asyncio.Task[Any]] = set()
        """Those that have not ended."""

    def spawn(self, work: Coroutine[Any, Any, T], name: str | None = None) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def end(self) -> None:
        await end_tasks(self.tasks)


class SharedWork(Generic[K, T]):
    """Work under keys, each done once for all that wait for it then, and cancelled when nobody does any more.
    Results are not kept. Made on the loop."""

    def __init__(self) -> None:
        self.jobs: dict[K, asyncio.Task[T]] = {}
        """Those under way."""
        self._callers = Counter[asyncio.Task[T]]()
        self._closed: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()

    async def result(self, key: K, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Return the result of the work under way or, without any, of ``work()``. Raises what that raises,
        and the error of :meth:`close`; each caller has its own copy of an error of this package."""
        if self._closed.done():
            raise frameless(self._closed.result())
        task = self.jobs.get(key)
        if task is None:
            task = self.jobs[key] = asyncio.ensure_future(work())
            task.add_done_callback(_look_at_error)
        self._callers[task] += 1
        either: list[asyncio.Future[Any]] = [task, self._closed]
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._callers -= Counter([task])
            if self.jobs.get(key) is task and (task.done() or task not in self._callers):
                del self.jobs[key]
            if task not in self._callers:
                task.cancel()
        error = self._closed.result() if self._closed.done() else task.exception()
        if error is not None:
            raise frameless(error)
        return task.result()

    def close(self, error: Exception) -> list[asyncio.Task[T]]:
        """Cancel all work, which those who wait do not wait for. Returns its tasks."""
        tasks = list(self.jobs.values())
        if not self._closed.done():
            self._closed.set_result(error)
        for task in tasks:
            task.cancel()
        return tasks


def _look_at_error(task: asyncio.Task[Any]) -> None:
    """Keep asyncio from logging an error that nobody is left to read."""
    if not task.cancelled():
        task.exception()


class WorkInTurns(Generic[K, T]):
    """Work under keys that owners ask for: at most ``most`` at a time, and ``each`` of one owner, so that
    what one owner wants holds up no other. All callers of an owner share it, as by :class:`SharedWork`."""

    def __init__(self, most: int, each: int) -> None:
        self.shared = SharedWork[tuple[str | None, K], T]()
        """By owner and key; what waits for its turn included."""
        self._free = asyncio.Semaphore(most)
        self._each = each
        self._own = WeakValueDictionary[str | None, asyncio.Semaphore]()

    async def result(self, owner: str | None, key: K, work: Callable[[], Awaitable[T]]) -> T:
        """Return what :meth:`SharedWork.result` does; ``work()`` begins when the owner's turn has come."""

        async def in_turn() -> T:
            own = self._own.setdefault(owner, asyncio.Semaphore(self._each))
            async with own, self._free:
                return await work()

        return await self.shared.result((owner, key), in_turn)
