"""Has the choices and inputs of requests begin in turns."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Hashable

from aioengine.server.transport.turns import Turns


class Starts:
    """Lets a few choices begin in each pass of the event loop, and those of each owner in turn.

    One small request may ask for 128 choices, and each one that begins takes the loop a good part of a
    millisecond. So a few such requests at once would hold up everybody; and most of what a client has asked
    for that leaves at once is never begun.

    Args:
        open_requests: Returns the number of open requests.
    """

    def __init__(
        self, open_requests: Callable[[], int], timer: Callable[[], float] = time.perf_counter
    ) -> None:
        self._open_requests = open_requests
        self._waiting: Counter[Hashable] = Counter()
        """Choices that wait, by request."""
        self._turns = Turns(self._is_busy, timer)

    def _is_busy(self) -> bool:
        """Whether there are requests besides those that wait here, whose steps must not become slower."""
        return self._open_requests() > len(self._waiting)

    async def turn(self, owner: str | None, request: Hashable) -> None:
        """Wait for a turn for a choice of ``request``; at once if nobody else waits."""
        start = _Start(owner or "")
        self._waiting[request] += 1
        try:
            self._turns.ask(start)
            await start.begun
        finally:
            self._waiting[request] -= 1
            if not self._waiting[request]:
                del self._waiting[request]


class _Start:
    """A choice that waits for its turn."""

    def __init__(self, owner: str) -> None:
        self.loop = asyncio.get_running_loop()
        self.begun: asyncio.Future[None] = self.loop.create_future()
        self.owner = owner
        self.has_asked = False

    @property
    def is_closing(self) -> bool:
        """Whether it is not waited for any more."""
        return self.begun.done()

    def take_turn(self) -> None:
        if not self.begun.done():
            self.begun.set_result(None)
