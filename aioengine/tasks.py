"""Asyncio tasks that nobody may leave behind, that several callers share, or that take turns."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Hashable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


async def run_to_completion(work: Awaitable[T], *, unless: Callable[[], bool] = lambda: False) -> T:
    """Run ``work``, which would leave threads or processes behind, to completion despite cancellation; raise
    that then, and drop the result. If ``unless()`` is true at a cancellation, ``work`` is cancelled, too."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
            if unless():
                task.cancel()
    if cancelled is not None:
        await end_tasks([task])
        raise cancelled
    return task.result()


async def together(works: Sequence[Awaitable[T]]) -> list[T]:
    """Run all and return their results, in order. When one fails, or the call is cancelled, the others are
    cancelled and awaited."""
    if len(works) == 1:
        return [await works[0]]
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


class Turns:
    """Turns of owners, one for each piece of work: at most ``most`` at a time, and ``each`` of one owner, so
    that what one owner wants holds up no other."""

    def __init__(self, most: int, each: int) -> None:
        self._free = asyncio.Semaphore(most)
        self._each = each
        self._own: dict[Hashable, asyncio.Semaphore] = {}
        self._users: Counter[Hashable] = Counter()

    @asynccontextmanager
    async def turn(self, owner: Hashable) -> AsyncIterator[None]:
        """Context of a piece of work, which waits for its turn."""
        self._users[owner] += 1
        try:
            async with self._own.setdefault(owner, asyncio.Semaphore(self._each)), self._free:
                yield
        finally:
            self._users[owner] -= 1
            if not self._users[owner]:
                del self._users[owner], self._own[owner]


class SharedWork(Generic[K, T]):
    """Work under keys, each done once for all that wait for it then, and cancelled when nobody does any more.
    Results are not kept."""

    def __init__(self) -> None:
        self.jobs: dict[K, _Job[T]] = {}
        """Those under way."""
        self._closed: Exception | None = None

    async def result(self, key: K, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Return the result of the work under way or, without any, of ``work()``. Raises what that raises,
        the same error for all, and the error of :meth:`close`."""
        if self._closed is not None:
            raise self._closed
        job = self.jobs.get(key)
        if job is None:
            job = self.jobs[key] = _Job(asyncio.ensure_future(work()))
        job.callers += 1
        try:
            await asyncio.wait([job.over])
        finally:
            job.callers -= 1
            if self.jobs.get(key) is job and (job.over.done() or not job.callers):
                del self.jobs[key]
            if not job.callers:
                job.task.cancel()
        if self._closed is not None:
            raise self._closed
        return job.task.result()

    def close(self, error: Exception) -> list[asyncio.Task[T]]:
        """Cancel all work, which those who wait do not wait for. Returns its tasks."""
        self._closed = error
        tasks = []
        for job in self.jobs.values():
            job.end()
            job.task.cancel()
            tasks.append(job.task)
        return tasks


class _Job(Generic[T]):
    def __init__(self, task: asyncio.Task[T]) -> None:
        self.task = task
        self.callers = 0
        self.over: asyncio.Future[None] = task.get_loop().create_future()
        """Done when nobody has to wait any more."""
        task.add_done_callback(self.end)

    def end(self, task: asyncio.Task[T] | None = None) -> None:
        if task is not None and not task.cancelled():
            task.exception()  # nobody may be left to read it, and asyncio would log that
        if not self.over.done():
            self.over.set_result(None)
