"""Pins: contents of the prefix cache that are kept for a time, and for whom.

A pin is on the identity (hash) of a block, so it outlives the request that computed it. It ends a number of
seconds after its last use. The bounds are shared as waiting places are: a tenant may have all pins while
nobody else has any; when others pin, the tenant with the most loses those that it has used least recently.
The pins of a prefix are lost from its end, because a block is of use only with all blocks before it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from heapq import heapify, heapreplace
from typing import NamedTuple

Tenant = str | None


class _Pin(NamedTuple):
    owner: Tenant
    seconds: float
    until: float


class PrefixPins:
    """Pinned blocks by hash, ``most`` in all and ``most_per_tenant`` of each tenant. It has no clock."""

    def __init__(self, most: int, most_per_tenant: int | None = None) -> None:
        self.most = most
        self.most_per_tenant = most if most_per_tenant is None else min(most, most_per_tenant)
        self._pins: dict[bytes, _Pin] = {}
        self._of: dict[Tenant, OrderedDict[bytes, None]] = {}
        """Each tenant's pins, the least recently used first."""
        self.next_end: float | None = None
        """A time before which no pin ends."""

    def __len__(self) -> int:
        return len(self._pins)

    def __contains__(self, digest: object) -> bool:
        return digest in self._pins

    def count(self, tenant: Tenant) -> int:
        return len(self._of.get(tenant, ()))

    def pin(self, tenant: Tenant, prefix: Sequence[bytes], seconds: float, now: float) -> list[bytes]:
        """Pin as many blocks of ``prefix``, from its first on, as the bounds allow, until ``seconds`` after
        their last use. A block that is pinned already keeps the later end, and from now on it counts as this
        tenant's. Returns the blocks that are not pinned any more."""
        for digest in reversed(prefix[: self.most_per_tenant]):
            old = self.remove(digest) or _Pin(tenant, 0.0, 0.0)
            until = max(old.until, now + seconds)
            self._pins[digest] = _Pin(tenant, max(old.seconds, seconds), until)
            self._of.setdefault(tenant, OrderedDict())[digest] = None
            self.next_end = until if self.next_end is None else min(self.next_end, until)
        lost = [self._lose(tenant) for _ in range(self.count(tenant) - self.most_per_tenant)]
        over = len(self._pins) - self.most
        if over > 0:  # each from the tenant that has the most then; the newcomer loses first among equals
            tenants = list(self._of)
            sizes = [(-self.count(who), who != tenant, place) for place, who in enumerate(tenants)]
            heapify(sizes)
            for _ in range(over):
                size, other, place = sizes[0]
                lost.append(self._lose(tenants[place]))
                heapreplace(sizes, (size + 1, other, place))
        return lost

    def use(self, prefix: Sequence[bytes], now: float) -> None:
        """Note a use of a prefix: the ends of its pins move."""
        for digest in reversed(prefix) if self._pins else ():
            pin = self._pins.get(digest)
            if pin is not None:
                self._pins[digest] = pin._replace(until=max(pin.until, now + pin.seconds))
                self._of[pin.owner].move_to_end(digest)

    def expire(self, now: float) -> list[bytes]:
        """Remove the pins that have ended, and return their blocks."""
        if self.next_end is None or self.next_end > now:
            return []
        ended = [digest for digest, pin in self._pins.items() if pin.until <= now]
        for digest in ended:
            self.remove(digest)
        self.next_end = min((pin.until for pin in self._pins.values()), default=None)
        return ended

    def remove(self, digest: bytes) -> _Pin | None:
        """Remove a pin, if there is one, because its block is reused. Returns it."""
        pin = self._pins.pop(digest, None)
        if pin is not None:
            own = self._of[pin.owner]
            del own[digest]
            if not own:
                del self._of[pin.owner]
        return pin

    def clear(self) -> None:
        self._pins.clear()
        self._of.clear()
        self.next_end = None

    def _lose(self, tenant: Tenant) -> bytes:
        """Remove the pin that a tenant has used least recently."""
        digest = next(iter(self._of[tenant]))
        self.remove(digest)
        return digest

    def check(self) -> None:
        """Assert that all counts agree and that the bounds hold."""
        owned = {digest: tenant for tenant, own in self._of.items() for digest in own}
        assert owned == {digest: pin.owner for digest, pin in self._pins.items()}
        assert all(self._of.values())
        assert sum(map(len, self._of.values())) == len(self._pins) <= self.most
        assert all(len(own) <= self.most_per_tenant for own in self._of.values())
        assert all(self.next_end is not None and self.next_end <= pin.until for pin in self._pins.values())
