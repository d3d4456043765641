"""What clients share, and what they can make others wait for: two tables, and the shares that follow from
them.

Nobody can take all of a thing. Its bound is for all *owners* together (an owner is a tenant or, without keys,
an address), and one owner may have a part of what the others leave. Nobody's wait is in another's hand: each
one is given up after a time.
"""

from __future__ import annotations

import asyncio
import functools
import math
from collections import Counter
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
INPUT = Bound(256 * 2**20)
"""Bytes that connections have sent ahead of their turn, by address."""
BODIES = Bound(32)
"""Bodies of the largest size that are received, or processed before their answer begins. An owner may always
have one."""
UPLOADS = Bound(2)
"""The same for uploads of the largest size."""
NUMBERS = Bound(2**22)
"""Log-probabilities of open requests, at about 120 bytes each."""
UNREAD = Bound(256 * 2**20)
"""Bytes of the answers larger than a part that are being sent, and of those that wait for room. An owner may
always have one, if there is room."""


class Wait(NamedTuple):
    """How long something is waited for, by whatever another does."""

    seconds: float | str
    """Or the setting that says it."""
    then: str


WAITS = {
    "a TLS handshake": Wait("header_timeout", "the connection is closed"),
    "the headers of a request": Wait("header_timeout", "the connection is closed"),
    "the next request of a connection": Wait("keep_alive", "the connection is closed"),
    "the next part of a body": Wait("read_timeout", "408"),
    "the rest of a refused body": Wait(5.0, "the connection is closed"),
    "room for a large answer": Wait(5.0, "503"),
    "a client that reads": Wait("send_timeout", "the connection is cut off"),
    "the end of a generation": Wait("request_timeout", "504"),
    "the step that runs": Wait("stuck_step_seconds", "/health answers 503"),
    "open requests, at the end of the server": Wait("grace_seconds", "they end with an error"),
}
"""What is waited for, by the request or the connection that does; see docs/security-testing.md."""


def seconds_of(wait: str) -> float:
    """Return the seconds of a wait that no setting says."""
    seconds = WAITS[wait].seconds
    assert isinstance(seconds, float)
    return seconds


class Shares:
    """What owners hold of one thing."""

    def __init__(self, bound: Bound) -> None:
        self.most, self._part = bound
        self.held = 0
        self._of: Counter[str | None] = Counter()
        self._waiting = 0
        self._freed = asyncio.Event()
        """Set when something is given back, and then replaced."""

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
        self._freed.set()
        self._freed = asyncio.Event()

    async def take_soon(self, owner: str | None, more: int, seconds: float, *, alone: int = 0) -> bool:
        """Count ``more`` once there is room, within ``seconds``; returns whether there was. As much as there
        is may wait."""
        if self.take(owner, more, alone=alone):
            return True
        if self._waiting + more > self.most:
            return False
        self._waiting += more
        try:
            async with asyncio.timeout(seconds):
                while not self.take(owner, more, alone=alone):
                    await self._freed.wait()
            return True
        except TimeoutError:
            return False
        finally:
            self._waiting -= more

    def has(self, owner: str | None) -> bool:
        """Whether this owner holds any."""
        return self._of[owner] > 0


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
