"""Turns on the event loop of connections with unparsed bytes."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

PER_PASS = 16
SECONDS = 0.005
PATIENCE = 0.1
"""Seconds of a non-empty queue after which it counts as a flood."""


class Turns:
    """Queue of turns; a connection parses a request or a slice of a body in each. In one pass of the loop, as
    many are taken as ``PER_PASS`` and ``SECONDS`` allow; the others wait, and their owners have turns one
    after the other. So data that arrives at once, from however many connections, cannot delay the loop's
    other work, and one owner's connections do not delay another's.

    A queue that has not been empty for ``PATIENCE`` seconds is a flood: the loop would never be idle, and the
    thread of the model's steps would wait for the interpreter lock each time that it needs it. Then, while
    ``is_busy()``, each pass is followed by a rest as long as the pass and its answers took, so that half of
    the time remains for the steps.
    """

    def __init__(
        self,
        is_busy: Callable[[], bool],
        loop: asyncio.AbstractEventLoop,
        timer: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._is_busy, self._loop, self._timer = is_busy, loop, timer
        self._lines: dict[str, deque[Callable[[], None]]] = {}
        """Turns that wait by owner, in the order in which owners have them; none is empty."""
        self._waited_since: float | None = None
        """Time since when the queue has not been empty; None if it is."""

    def ask(self, owner: str, turn: Callable[[], None]) -> None:
        """Call ``turn`` in one of the loop's next passes."""
        self._lines.setdefault(owner, deque()).append(turn)
        if self._waited_since is None:
            self._waited_since = self._timer()
            self._loop.call_soon(self._pass)

    def _pass(self) -> None:
        began = self._timer()
        self._loop.call_soon(self._end_pass, began)  # when these turns are over, whatever they raise
        for _ in range(PER_PASS):
            if not self._lines or self._timer() - began > SECONDS:
                break
            owner = next(iter(self._lines))
            line = self._lines.pop(owner)
            take = line.popleft()
            if line:
                self._lines[owner] = line
            take()

    def _end_pass(self, began: float) -> None:
        """Begin the next pass, at once or after a rest."""
        if not self._lines or self._waited_since is None:
            self._waited_since = None
            return
        now = self._timer()
        is_flood = now - self._waited_since > PATIENCE and self._is_busy()
        self._loop.call_later(now - began if is_flood else 0.0, self._pass)
