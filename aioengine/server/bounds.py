"""What clients share: a table of bounds, the shares that follow from it, and turns on the event loop.

Nobody can take all of a thing. Its bound is for all *owners* together (an owner is a tenant or, without keys,
an address), and one owner may have a part of what the others leave. What takes time has turns, and its owners
have them one after the other.
"""

from __future__ import annotations

import asyncio
import functools
import math
import time
from collections import Counter, deque
from collections.abc import Callable
from ipaddress import IPv6Address, ip_address
from typing import NamedTuple


class Bound(NamedTuple):
    """How much there is of something that clients share."""

    most: int
    part: float = 0.5
    """What one owner may have of what the others leave."""


CONNECTIONS = Bound(4096, 0.75)
"""Open connections, by address; ``max_connections`` is another number. All clients behind one proxy are
one."""
BODIES = Bound(32)
"""Bodies of the largest size that are received, or processed before their answer begins. An owner may always
have one."""
UPLOADS = Bound(2)
"""The same for uploads of the largest size."""
NUMBERS = Bound(2**22)
"""Log-probabilities of open requests, at about 120 bytes each."""
UNREAD = Bound(256 * 2**20)
"""Bytes of the answers larger than a part that are being sent. An owner may always have one, if there is
room."""


class Shares:
    """What owners hold of one thing."""

    def __init__(self, bound: Bound) -> None:
        self.most, self._part = bound
        self.held = 0
        self._of: Counter[str | None] = Counter()

    def take(self, owner: str | None, more: int, *, alone: int = 0) -> bool:
        """Count ``more`` for ``owner``, if there is room for it; returns whether there is. An owner's share
        is never less than ``alone``."""
        own = self._of[owner]
        left = self.most - (self.held - own)
        if own + more > min(left, max(math.ceil(left * self._part), alone)):
            return False
        self._of[owner] += more
        self.held += more
        return True

    def give_back(self, owner: str | None, less: int) -> None:
        """Count ``less`` no longer."""
        self.held -= less
        self._of[owner] -= less
        if not self._of[owner]:
            del self._of[owner]


PER_PASS, PASS_SECONDS = 16, 0.005
"""Bounds on the turns in one pass of the loop."""
PATIENCE = 0.1
"""Seconds of a non-empty queue after which it counts as a flood."""


class Turns:
    """Queue of turns; a connection parses a request or a slice of a body in each. In one pass of the loop, as
    many are taken as ``PER_PASS`` and ``PASS_SECONDS`` allow; the others wait, and their owners have turns
    one after the other. So data that arrives at once, from however many connections, cannot delay the loop's
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
            if not self._lines or self._timer() - began > PASS_SECONDS:
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


@functools.lru_cache(4096)
def network_of(client: str) -> str:
    """Return the address, or the first 64 bits of an IPv6 address, because one client owns all addresses of
    such a network."""
    try:
        address = ip_address(client)
    except ValueError:
        return client[:64]
    if address.version == 4 or address.ipv4_mapped:
        return client
    return f"{IPv6Address(int(address) >> 64 << 64)}/64"
