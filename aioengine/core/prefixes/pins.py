"""Pins: contents of the prefix cache that are kept for a time, and for whom.

A pin is on the identity (hash) of a block, so it outlives the request that computed it. It ends a number of
seconds after its last use. The bounds are shared as waiting places are: a tenant may have all pins while
nobody else has any; when others pin, the tenant with the most loses those that it has used least recently.
The pins of a prefix are lost from its end, because a block is of use only with all blocks before it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, heapreplace

Tenant = str | None


@dataclass(slots=True)
class _Pin:
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
        self._ends: list[tuple[float, bytes]] = []
        """Heap of times and pins. Each pin has an entry whose time is not after the pin's end."""

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
            pin = self._pins.get(digest)
            if pin is None:
                self._pins[digest] = _Pin(tenant, seconds, now + seconds)
                heappush(self._ends, (now + seconds, digest))
            else:
                self._leave(pin.owner, digest)
                pin.owner = tenant
                pin.seconds = max(pin.seconds, seconds)
                pin.until = max(pin.until, now + seconds)
            self._of.setdefault(tenant, OrderedDict())[digest] = None
        lost = [self._least_recent(tenant) for _ in range(self.count(tenant) - self.most_per_tenant)]
        return [*lost, *self._over_all(tenant)]

    def _over_all(self, newcomer: Tenant) -> list[bytes]:
        """Remove what is over the bound in all, each from the tenant that has the most then; the newcomer
        loses first among equals."""
        over = len(self._pins) - self.most
        if over <= 0:
            return []
        tenants = list(self._of)
        sizes = [(-len(own), tenants[i] != newcomer, i) for i, own in enumerate(self._of.values())]
        heapify(sizes)
        lost = []
        for _ in range(over):
            size, other, i = sizes[0]
            lost.append(self._least_recent(tenants[i]))
            heapreplace(sizes, (size + 1, other, i))
        return lost

    def use(self, prefix: Sequence[bytes], now: float) -> None:
        """Note a use of a prefix: the ends of its pins move."""
        if not self._pins:
            return
        for digest in reversed(prefix):
            pin = self._pins.get(digest)
            if pin is not None:
                pin.until = max(pin.until, now + pin.seconds)
                self._of[pin.owner].move_to_end(digest)

    @property
    def next_end(self) -> float | None:
        """A time before which no pin ends."""
        return self._ends[0][0] if self._ends else None

    def expire(self, now: float) -> list[bytes]:
        """Remove the pins that have ended, and return their blocks."""
        lost = []
        while self._ends and self._ends[0][0] <= now:
            digest = self._ends[0][1]
            pin = self._pins.get(digest)
            if pin is not None and pin.until > now:
                heapreplace(self._ends, (pin.until, digest))
                continue
            heappop(self._ends)
            if pin is not None:
                self._drop(digest)
                lost.append(digest)
        return lost

    def remove(self, digest: bytes) -> None:
        """Remove a pin, if there is one, because its block is reused."""
        if digest in self._pins:
            self._drop(digest)
            self._tidy()

    def clear(self) -> None:
        self._pins.clear()
        self._of.clear()
        self._ends.clear()

    def _least_recent(self, tenant: Tenant) -> bytes:
        digest = next(iter(self._of[tenant]))
        self._drop(digest)
        self._tidy()
        return digest

    def _drop(self, digest: bytes) -> None:
        self._leave(self._pins.pop(digest).owner, digest)

    def _leave(self, tenant: Tenant, digest: bytes) -> None:
        own = self._of[tenant]
        del own[digest]
        if not own:
            del self._of[tenant]

    def _tidy(self) -> None:
        """Rebuild the heap when most of its entries are of pins that were removed."""
        if len(self._ends) > 2 * len(self._pins) + 16:
            self._ends = [(pin.until, digest) for digest, pin in self._pins.items()]
            heapify(self._ends)

    def check(self) -> None:
        """Assert that all counts agree and that the bounds hold."""
        owned = {digest: tenant for tenant, own in self._of.items() for digest in own}
        assert owned == {digest: pin.owner for digest, pin in self._pins.items()}
        assert all(self._of.values())
        assert sum(map(len, self._of.values())) == len(self._pins) <= self.most
        assert all(len(own) <= self.most_per_tenant for own in self._of.values())
        first: dict[bytes, float] = {}
        for at, digest in self._ends:
            first[digest] = min(at, first.get(digest, at))
        assert all(first[digest] <= pin.until for digest, pin in self._pins.items())
