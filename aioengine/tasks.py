"""Functions that wait for asyncio tasks which nobody may leave behind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, TypeVar

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
