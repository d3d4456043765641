"""Turns on the event loop: of connections with unparsed bytes, and of choices that begin."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable
from typing import Protocol

PER_PASS = 16
SECONDS = 0.005
FEWEST = 4
PASS_SECONDS = 0.02
"""Time that a pass may take with the answers that its turns lead to. After a longer one the next has half as
many turns, and at least ``FEWEST``."""
PATIENCE = 0.1
"""Seconds of a non-empty queue after which it counts as a flood."""


class Connection(Protocol):
    loop: asyncio.AbstractEventLoop
    has_asked: bool
    """Whether it is in the queue; only :class:`Turns` writes it."""

    @property
    def owner(self) -> str: ...

    @property
    def is_closing(self) -> bool:
        """Whether there is nothing to be parsed any more."""

    def take_turn(self) -> None:
        """Parse one request, or one slice of a body."""


class Turns:
    """Queue of connections. In one pass of the loop, as many connections have a turn as ``PER_PASS`` and
    ``SECONDS`` allow; the others wait, and their owners have turns one after the other. So data that arrives
    at once, from however many connections, cannot delay the loop's other work, and one owner's connections
    do not delay another's.

    A queue that has not been empty for ``PATIENCE`` seconds is a flood: the loop would never be idle, and the
    thread of the model's steps would wait for the interpreter lock each time that it needs it. Then, while
    ``is_busy()``, each pass is followed by a rest as long as the pass and its answers took, so that half of
    the time remains for the steps.
    """

    def __init__(self, is_busy: Callable[[], bool], timer: Callable[[], float] = time.perf_counter) -> None:
        self._is_busy, self._timer = is_busy, timer
        self._lines: dict[str, deque[Connection]] = {}
        """Waiting connections by owner, in the order in which owners have turns; none is empty."""
        self._waiting = 0
        self._most = self._left = PER_PASS
        self._is_scheduled = False
        self._waited_since: float | None = None
        """Time since when the queue has not been empty."""
        self._pass_began = 0.0

    def ask(self, connection: Connection) -> None:
        """Give ``connection`` a turn, at once if no other waits."""
        if self._lines or self._left == 0:
            self.ask_later(connection)
            return
        self._left -= 1
        self._schedule(connection.loop)
        connection.take_turn()

    def ask_later(self, connection: Connection) -> None:
        """Give ``connection`` a turn in one of the loop's next passes."""
        if not connection.has_asked:
            connection.has_asked = True
            self._lines.setdefault(connection.owner, deque()).append(connection)
            self._waiting += 1
            self._schedule(connection.loop)

    def _next(self) -> Connection | None:
        """Take the next connection out of the queue. Owners have turns one after the other, however many
        connections each of them has."""
        while self._lines:
            owner = next(iter(self._lines))
            line = self._lines.pop(owner)
            connection = line.popleft()
            connection.has_asked = False
            self._waiting -= 1
            if line:
                self._lines[owner] = line
            if not connection.is_closing:
                return connection
            connection.take_turn()  # which drops what it has kept
        return None

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            self._pass_began = self._timer()
            loop.call_soon(self._end_pass, loop)

    def _end_pass(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin the next pass, at once or after a rest."""
        now = self._timer()
        if now - self._pass_began > PASS_SECONDS:
            self._most = max(self._most // 2, FEWEST)
        elif self._most < PER_PASS:
            self._most += 1
        if not self._lines:
            self._waited_since = None
        elif self._waited_since is None:
            self._waited_since = now
        elif now - self._waited_since > PATIENCE and self._is_busy():
            loop.call_later(now - self._pass_began, self._pass, loop)
            return
        self._pass(loop)

    def _pass(self, loop: asyncio.AbstractEventLoop) -> None:
        self._is_scheduled = False
        self._left = most = self._most
        end = self._timer() + SECONDS
        for _ in range(min(most, self._waiting)):
            connection = self._next()
            if connection is None:
                break
            self._left -= 1
            connection.take_turn()
            if self._timer() > end:
                self._left = 0
                break
        if self._left < most:
            self._schedule(loop)


class Starts:
    """Lets a few choices begin in each pass of the event loop, and those of each owner in turn.

    One small request may ask for 128 choices, and each one that begins takes the loop a good part of a
    millisecond. So a few such requests at once would hold up everybody; and most of what a client has asked
    for that leaves at once is never begun. ``open_requests`` returns the number of open requests.
    """

    def __init__(
        self, open_requests: Callable[[], int], timer: Callable[[], float] = time.perf_counter
    ) -> None:
        self._waiting: Counter[Hashable] = Counter()
        """Choices that wait, by request."""
        # There are requests besides those that wait here, whose steps must not become slower.
        self._turns = Turns(lambda: open_requests() > len(self._waiting), timer)

    async def turn(self, owner: str | None, request: Hashable) -> None:
        """Wait for a turn for a choice of ``request``; at once if nobody else waits."""
        start = Start(owner or "")
        self._waiting[request] += 1
        try:
            self._turns.ask(start)
            await start.begun
        finally:
            self._waiting[request] -= 1
            if not self._waiting[request]:
                del self._waiting[request]


class Start:
    """Something that begins with a turn of its own: then ``begun`` is done."""

    has_asked = False

    def __init__(self, owner: str) -> None:
        self.loop = asyncio.get_running_loop()
        self.begun: asyncio.Future[None] = self.loop.create_future()
        self.owner = owner

    @property
    def is_closing(self) -> bool:
        """Whether it is not waited for any more."""
        return self.begun.done()

    def take_turn(self) -> None:
        if not self.begun.done():
            self.begun.set_result(None)
