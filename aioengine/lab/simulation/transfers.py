"""Concurrent transfers of a simulated device, which share a stage's bandwidth."""

from __future__ import annotations

import asyncio
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
