"""Work that ends when its client goes away, or its key becomes invalid."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from aioengine.metrics.page.plumbing import Departure, Receive, disconnected
from aioengine.server.errors import ApiError, ClientDisconnected
from aioengine.tasks import end_tasks

T = TypeVar("T")


async def while_connected(
    receive: Receive,
    departure: Departure | None,
    work: Coroutine[Any, Any, T],
    *ends: asyncio.Future[ApiError] | None,
) -> T:
    """Return the result of ``work``, unless the client disconnects or one of ``ends`` is done first: then
    ``work`` is cancelled.

    Raises ClientDisconnected, the error that ended it, and what ``work`` raises. ``departure`` tells that the
    client has gone, or else ``receive`` does, which is ASGI's, after the body was read.
    """
    task = asyncio.current_task()
    assert task is not None
    if departure is not None and departure.has_happened:
        work.close()
        raise ClientDisconnected
    cancels = task.cancelling()
    why: list[BaseException] = []

    def end(error: BaseException) -> None:
        if not why:
            why.append(error)
            task.cancel()  # as asyncio.timeout does, so that the work needs no task of its own

    def ended(first: asyncio.Future[Any]) -> None:
        if not first.cancelled():
            end(first.exception() or (ClientDisconnected() if first is gone else first.result()))

    def left() -> None:
        end(ClientDisconnected())

    watched: list[asyncio.Future[Any]] = [end for end in ends if end is not None]
    gone: asyncio.Future[Any] | None = None
    if departure is None:
        gone = asyncio.ensure_future(disconnected(receive))
        watched.append(gone)
    else:
        departure.tell(left)
    for future in watched:
        future.add_done_callback(ended)
    try:
        return await work
    except asyncio.CancelledError:
        if why and task.uncancel() <= cancels:
            raise why[0] from None
        raise
    finally:
        for future in watched:
            future.remove_done_callback(ended)
        if departure is not None:
            departure.forget(left)
        if gone is not None:
            await end_tasks([gone])


async def until_ended(work: Coroutine[Any, Any, None], ended: asyncio.Future[ApiError] | None) -> None:
    """Run ``work``. When ``ended`` is done, cancel it and raise the error of ``ended``."""
    task = asyncio.ensure_future(work)
    try:
        await _first_of(task, ended)
        if task.done():
            task.result()
    finally:
        await end_tasks([task])


async def _first_of(*futures: asyncio.Future[Any] | None) -> None:
    given = [future for future in futures if future is not None]
    await asyncio.wait(given, return_when=asyncio.FIRST_COMPLETED)
