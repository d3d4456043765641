"""Turns on the event loop, for connections that have something to be parsed."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

PER_PASS = 16
SECONDS = 0.005
PATIENCE = 0.1
"""Seconds for which connections may wait in line before the line is taken for a flood."""


class Connection(Protocol):
    loop: asyncio.AbstractEventLoop
    has_asked: bool
    """It is in line; only :class:`Turns` writes it."""

    def take_turn(self) -> None:
        """Parse one request, or one slice of a body."""


class Turns:
    """In one pass of the loop so many connections have a turn as ``PER_PASS`` and ``SECONDS`` allow, each
    one; the others wait in line. So what arrives at once, from however many connections, cannot hold up
    what else the loop has to do.

    A line that has not been empty for ``PATIENCE`` seconds is a flood: the loop would never be idle, and
    each time that the thread of the model's steps needs the interpreter it would wait for it. Then, while
    ``is_busy()``, each pass is followed by a rest as long as the pass took with the answers that it led to,
    so that half of the time stays for the steps.
    """

    def __init__(self, is_busy: Callable[[], bool], timer: Callable[[], float] = time.perf_counter) -> None:
        self._is_busy = is_busy
        self._timer = timer
        self._line: deque[Connection] = deque()
        self._left = PER_PASS
        self._is_scheduled = False
        self._waited_since: float | None = None
        """Since when the line has not been empty."""
        self._pass_began = 0.0
        self.held = 0
        """Bytes that connections keep until they have a turn."""

    def ask(self, connection: Connection) -> None:
        """A turn for ``connection``: at once if nobody waits for one."""
        if self._line or self._left == 0:
            self.ask_later(connection)
            return
        self._left -= 1
        self._schedule(connection.loop)
        connection.take_turn()

    def ask_later(self, connection: Connection) -> None:
        """A turn for ``connection`` in one of the loop's next passes."""
        if not connection.has_asked:
            connection.has_asked = True
            self._line.append(connection)
            self._schedule(connection.loop)

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            self._pass_began = self._timer()
            loop.call_soon(self._end_pass, loop)

    def _end_pass(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin the next pass, at once or after a rest."""
        now = self._timer()
        if not self._line:
            self._waited_since = None
        elif self._waited_since is None:
            self._waited_since = now
        elif now - self._waited_since > PATIENCE and self._is_busy():
            loop.call_later(now - self._pass_began, self._pass, loop)
            return
        self._pass(loop)

    def _pass(self, loop: asyncio.AbstractEventLoop) -> None:
        self._is_scheduled = False
        self._left = PER_PASS
        end = self._timer() + SECONDS
        for _ in range(min(PER_PASS, len(self._line))):
            connection = self._line.popleft()
            connection.has_asked = False
            self._left -= 1
            connection.take_turn()
            if self._timer() > end:
                self._left = 0
                break
        if self._left < PER_PASS:
            self._schedule(loop)
