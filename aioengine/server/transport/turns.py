"""Gives connections with unparsed bytes their turns on the event loop."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

PER_PASS = 16
SECONDS = 0.005
PATIENCE = 0.1
"""Seconds of a non-empty queue after which it counts as a flood."""


class Connection(Protocol):
    loop: asyncio.AbstractEventLoop
    has_asked: bool
    """Whether it is in the queue; only :class:`Turns` writes it."""

    def take_turn(self) -> None:
        """Parse one request, or one slice of a body."""


class Turns:
    """Queue of connections. In one pass of the loop, as many connections have a turn as ``PER_PASS`` and
    ``SECONDS`` allow, one each; the others wait. So data that arrives at once, from however many connections,
    cannot delay the loop's other work.

    A queue that has not been empty for ``PATIENCE`` seconds is a flood: the loop would never be idle, and the
    thread of the model's steps would wait for the interpreter lock each time that it needs it. Then, while
    ``is_busy()``, each pass is followed by a rest as long as the pass and its answers took, so that half of
    the time remains for the steps.
    """

    def __init__(self, is_busy: Callable[[], bool], timer: Callable[[], float] = time.perf_counter) -> None:
        self._is_busy = is_busy
        self._timer = timer
        self._line: deque[Connection] = deque()
        self._left = PER_PASS
        self._is_scheduled = False
        self._waited_since: float | None = None
        """Time since when the queue has not been empty."""
        self._pass_began = 0.0
        self.held = 0
        """Bytes that waiting connections hold."""

    def ask(self, connection: Connection) -> None:
        """Give ``connection`` a turn, at once if no other waits."""
        if self._line or self._left == 0:
            self.ask_later(connection)
            return
        self._left -= 1
        self._schedule(connection.loop)
        connection.take_turn()

    def ask_later(self, connection: Connection) -> None:
        """Give ``connection`` a turn in one of the loop's next passes."""
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
