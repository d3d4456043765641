"""Concurrent work of a simulated device: transfers that share a stage's bandwidth, and steps beside them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from heapq import heapify, heappop, heappush

from aioengine.lab.costs.model import Stage


class SharedStage:
    """Simultaneous transfers of one stage. After its latency, each gets an equal share of the bandwidth at
    any time (processor sharing).

    In any interval all transfers get the same number of bytes. So one count is enough: the bytes that each
    has got since the stage was last idle. A transfer is done when the count has risen by its size.
    """

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._given = 0.0
        self._as_of = 0.0
        self._ends: list[tuple[float, int, asyncio.Future[None]]] = []
        """Heap of: the count at which it is done, its number, what it waits for."""
        self._started = 0
        self._timer: asyncio.TimerHandle | None = None

    async def transfer(self, nbytes: float) -> float:
        """Return the seconds that it took."""
        loop = asyncio.get_running_loop()
        start = loop.time()
        await asyncio.sleep(self._stage.latency)
        if nbytes > 0:
            self._advance(loop.time())
            done: asyncio.Future[None] = loop.create_future()
            self._started += 1
            heappush(self._ends, (self._given + nbytes, self._started, done))
            self._plan(loop)
            try:
                await done
            except asyncio.CancelledError:
                self._advance(loop.time())
                self._ends = [end for end in self._ends if end[2] is not done]
                heapify(self._ends)
                self._plan(loop)
                raise
        return loop.time() - start

    def _advance(self, now: float) -> None:
        if self._ends:
            self._given += (now - self._as_of) * self._stage.bandwidth / len(self._ends)
        else:
            self._given = 0.0
        self._as_of = now

    def _plan(self, loop: asyncio.AbstractEventLoop) -> None:
        """Set the timer for the transfer that ends next."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._ends:
            left = max(self._ends[0][0] - self._given, 0.0) * len(self._ends)
            self._timer = loop.call_later(left / self._stage.bandwidth, self._finish, loop)

    def _finish(self, loop: asyncio.AbstractEventLoop) -> None:
        self._advance(loop.time())
        self._given = max(self._given, self._ends[0][0])  # rounding of floats must not leave a byte
        while self._ends and self._ends[0][0] <= self._given:
            done = heappop(self._ends)[2]
            if not done.done():
                done.set_result(None)
        self._plan(loop)


class Processor:
    """Processor that does one piece of work at a time, and is slower while it is disturbed."""

    def __init__(self) -> None:
        self._paces: list[float] = [1.0]
        """Factors of all disturbances on the time of work; the largest counts."""
        self._left = 0.0
        self._as_of = 0.0
        self._began = 0.0
        self._done: Callable[[float], None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, seconds: float, done: Callable[[float], None]) -> None:
        """Begin work of this many seconds. ``done`` is called at its end with the seconds that it took:
        ``seconds`` if it was not disturbed."""
        loop = asyncio.get_running_loop()
        self._began = self._as_of = loop.time()
        self._left = seconds
        self._done = done
        self._plan(loop)

    @property
    def pace(self) -> float:
        """Seconds for a second's work."""
        return max(self._paces)

    @contextmanager
    def disturbed(self, slowdown: float) -> Iterator[None]:
        """Make work take at least ``slowdown`` times as long while the context lasts."""
        self._change([*self._paces, slowdown])
        try:
            yield
        finally:
            paces = [*self._paces]
            paces.remove(slowdown)
            self._change(paces)

    def _change(self, paces: list[float]) -> None:
        """Set the factors, and adjust the work under way to them."""
        before, after = self.pace, max(paces)
        self._paces = paces
        if self._done is None or before == after:
            return
        loop = asyncio.get_running_loop()
        self._left = max(self._left - (loop.time() - self._as_of) / before, 0.0)
        self._as_of = loop.time()
        self._plan(loop)

    def _plan(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = loop.call_at(self._as_of + self._left * max(self._paces), self._finish)

    def _finish(self) -> None:
        done, self._done = self._done, None
        if done is not None:
            done(asyncio.get_running_loop().time() - self._began)
