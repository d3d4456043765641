"""Turns on the event loop of connections with unparsed bytes."""

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

    @property
    def owner(self) -> str: ...

    def take_turn(self) -> None:
        """Parse one request, or one slice of a body; nothing if the connection is closing."""


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
        self._waited_since: float | None = None
        """Time since when the queue has not been empty; None if it is."""

    def ask(self, connection: Connection) -> None:
        """Give ``connection`` a turn in one of the loop's next passes."""
        if connection.has_asked:
            return
        connection.has_asked = True
        self._lines.setdefault(connection.owner, deque()).append(connection)
        if self._waited_since is None:
            self._waited_since = self._timer()
            connection.loop.call_soon(self._pass, connection.loop)

    def _pass(self, loop: asyncio.AbstractEventLoop) -> None:
        began = self._timer()
        loop.call_soon(self._end_pass, loop, began)  # when these turns are over, whatever they raise
        for _ in range(PER_PASS):
            if not self._lines or self._timer() - began > SECONDS:
                break
            owner = next(iter(self._lines))
            line = self._lines.pop(owner)
            connection = line.popleft()
            if line:
                self._lines[owner] = line
            connection.has_asked = False
            connection.take_turn()

    def _end_pass(self, loop: asyncio.AbstractEventLoop, began: float) -> None:
        """Begin the next pass, at once or after a rest."""
        if not self._lines or self._waited_since is None:
            self._waited_since = None
            return
        now = self._timer()
        is_flood = now - self._waited_since > PATIENCE and self._is_busy()
        loop.call_later(now - began if is_flood else 0.0, self._pass, loop)


class Start:
    """Something that begins with a turn of its own: then ``begun`` is done."""

    has_asked = False

    def __init__(self, owner: str) -> None:
        self.loop = asyncio.get_running_loop()
        self.begun: asyncio.Future[None] = self.loop.create_future()
        self.owner = owner

    def take_turn(self) -> None:
        if not self.begun.done():
            self.begun.set_result(None)
