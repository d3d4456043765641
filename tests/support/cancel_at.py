"""Cancelling a coroutine at each point where it can be, one after the other."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Literal

Moment = Literal["waiting", "resuming"]
"""``waiting``: while it waits, so that what it waits for is cancelled too. ``resuming``: what it waited for
has come already, and the cancellation takes the place of the result."""


class CancelAt(Coroutine[Any, Any, Any]):
    """Runs ``inner``, and cancels it once, at its ``k``-th wait (from 0) or before its start (-1)."""

    def __init__(self, inner: Coroutine[Any, Any, Any], k: int, moment: Moment) -> None:
        self._inner = inner
        self._k = k
        self._moment = moment
        self._waits = 0
        self.done = False
        """It has been cancelled."""

    def send(self, value: Any) -> Any:
        if self._moment == "resuming" and self._waits == self._k + 1 and not self.done:
            self.done = True
            return self._count(self._inner.throw(asyncio.CancelledError()))
        return self._count(self._inner.send(value))

    def _count(self, waits_for: Any) -> Any:
        self._waits += 1
        if self._moment == "waiting" and self._waits == self._k + 1 and not self.done:
            self.done = True
            task = asyncio.current_task()
            assert task is not None
            asyncio.get_running_loop().call_soon(task.cancel)
        return waits_for

    def throw(self, *error: Any) -> Any:
        return self._count(self._inner.throw(*error))

    def close(self) -> None:
        self._inner.close()

    def __await__(self) -> Any:
        raise NotImplementedError


async def cancel_everywhere(
    work: Callable[[], Coroutine[Any, Any, Any]], moment: Moment, after: Callable[[], Awaitable[object]]
) -> int:
    """Runs ``work()`` again and again, cancelled at its first wait, its second, and so on, until a run has
    fewer waits than that; ``after`` each. Returns how many runs were cancelled."""
    cancelled = 0
    for k in range(10_000):
        wrapped = CancelAt(work(), k, moment)
        task = asyncio.create_task(wrapped)
        await asyncio.wait([task])
        if task.cancelled():
            cancelled += 1
        else:
            task.result()  # what it raised is an error of the test
        await after()
        if not wrapped.done:
            return cancelled
    raise AssertionError("it never ends")
