"""Turns on the event loop, for connections that have something to be parsed."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Protocol

PER_PASS = 16
SECONDS = 0.005


class Connection(Protocol):
    loop: asyncio.AbstractEventLoop
    has_asked: bool
    """It is in line; only :class:`Turns` writes it."""

    def take_turn(self) -> None:
        """Parse one request, or one slice of a body."""


class Turns:
    """In one pass of the loop so many connections have a turn as ``PER_PASS`` and ``SECONDS`` allow, each
    one; the others wait in line. So what arrives at once, from however many connections, cannot hold up
    what else the loop has to do."""

    def __init__(self) -> None:
        self._line: deque[Connection] = deque()
        self._left = PER_PASS
        self._is_scheduled = False
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
            loop.call_soon(self._pass, loop)

    def _pass(self, loop: asyncio.AbstractEventLoop) -> None:
        self._is_scheduled = False
        self._left = PER_PASS
        end = time.perf_counter() + SECONDS
        for _ in range(min(PER_PASS, len(self._line))):
            connection = self._line.popleft()
            connection.has_asked = False
            self._left -= 1
            connection.take_turn()
            if time.perf_counter() > end:
                self._left = 0
                break
        if self._left < PER_PASS:
            self._schedule(loop)
