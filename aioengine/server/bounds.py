"""What clients share: a table of bounds, and the shares that follow from it.

Nobody can take all of a thing. Its bound is for all *owners* together (an owner is a tenant or, without keys,
an address), and one owner may have a part of what the others leave.
"""

from __future__ import annotations

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
