"""Accounting of the CPU adapter cache: which adapters are in it, and which may be evicted.

Adapters in slots stay in the cache too, so that a slot can be given up without a copy back.

An adapter that a request waits for is not evicted, with one exception that keeps the cache fair: a request
that has waited longer may take the place of an adapter that only later requests need. Without the exception,
a few busy adapters could keep a cold one out for ever. A tenant with less than its share of the places may
also take one from a tenant with more, however long the latter has waited.

An adapter's size is known after its first read. Later reads reserve that size beforehand; the first one
reserves only a place, and room for its bytes is made when it arrives.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from aioengine.core.state import AdapterEntry
from aioengine.errors import AdapterTooLarge
from aioengine.schedulers.policy import Location

Order = Callable[[Sequence[AdapterEntry]], Sequence[AdapterEntry]]
"""Decides which of several equally evictable adapters is evicted first."""


def least_recently_used(entries: Sequence[AdapterEntry]) -> Sequence[AdapterEntry]:
    return sorted(entries, key=lambda entry: entry.last_used)


def _later(entry: AdapterEntry, newcomer: AdapterEntry) -> bool:
    """Whether a request for ``newcomer`` came before those for ``entry``, of the same time. It only matters
    to parts of mixes: two mixes that need each other's would both wait for ever."""
    mine, theirs = newcomer.head, entry.head
    mixed = newcomer.mixes or entry.mixes
    return bool(mixed) and mine is not None and theirs is not None and mine.seq < theirs.seq


class CpuCache:
    """At most ``capacity`` adapters with at most ``max_bytes`` (None: no bound) together."""

    def __init__(
        self, capacity: int, max_bytes: int | None = None, order: Order = least_recently_used
    ) -> None:
        self.capacity = capacity
        self.max_bytes = max_bytes
        self.entries: dict[int, AdapterEntry] = {}
        """Adapters that are resident or being read, by uid."""
        self.used_bytes = 0
        self._counted: dict[int, int] = {}
        """Bytes that each counts for in ``used_bytes``."""
        self._largest: int | None = None
        """The largest of those; None when it must be computed again."""
        self._order = order
        self.reserved: set[int] = set()
        """Uids of adapters that are not evicted, because the mix whose turn it is needs them all at once."""

    @property
    def room(self) -> int:
        """Number of adapters that fit without an eviction, each as large as the largest known one."""
        places = self.capacity - len(self.entries)
        if self.max_bytes is None:
            return places
        if self._largest is None:
            self._largest = max(self._counted.values(), default=0)
        return min(places, self.bytes_room // self._largest) if self._largest > 0 else places

    @property
    def bytes_room(self) -> int:
        """Bytes that are free. Only meaningful where ``max_bytes`` is not None."""
        assert self.max_bytes is not None
        return self.max_bytes - self.used_bytes

    def fits(self, entry: AdapterEntry) -> bool:
        """Whether the adapter can be added now without an eviction."""
        return not self._lacking(entry, self._reserved(entry))

    def add(self, entry: AdapterEntry) -> None:
        assert self.fits(entry) and entry.uid not in self.entries
        self.entries[entry.uid] = entry
        self._count(entry, self._reserved(entry))

    def resize(self, entry: AdapterEntry) -> bool:
        """Set the adapter's size, now that it is known; returns whether ``max_bytes`` still holds."""
        self._count(entry, entry.nbytes)
        return self.max_bytes is None or self.used_bytes <= self.max_bytes

    def remove(self, entry: AdapterEntry) -> None:
        self._count(entry, 0)
        del self.entries[entry.uid], self._counted[entry.uid]
        self._largest = None

    def pinned_bytes(self, besides: AdapterEntry) -> int:
        """Return the bytes of the pinned adapters but one."""
        return sum(e.nbytes for e in self.entries.values() if e.pinned and e is not besides)

    def can_ever_hold(self, entry: AdapterEntry, nbytes: int) -> bool:
        return self.max_bytes is None or nbytes + self.pinned_bytes(entry) <= self.max_bytes

    def refusal(self, entry: AdapterEntry, nbytes: int) -> AdapterTooLarge | None:
        """Return the reason why the adapter can never be kept; None if it can."""
        if self.can_ever_hold(entry, nbytes):
            return None
        pinned = self.pinned_bytes(entry)
        beside = f" beside the {pinned:,} bytes of pinned adapters" if pinned else ""
        todo = "raise LoRAConfig.max_cpu_lora_bytes" + (" or unpin one" if pinned else "")
        return AdapterTooLarge(
            f"it takes {nbytes:,} bytes of CPU memory, and max_cpu_lora_bytes={self.max_bytes:,} has no room "
            f"for that{beside}; {todo}",
            name=entry.label,
            path=entry.path,
        )

    def victims(
        self, newcomer: AdapterEntry, now: float, keep: set[int], offered: Collection[AdapterEntry] = ()
    ) -> list[AdapterEntry] | None:
        """Return the adapters to evict, in order, so that ``newcomer`` fits; None if it cannot fit now.

        The newcomer may be in the cache already; then only its bytes can be too many.

        Adapters that are unloaded go first. Then adapters outside the slots, then those in idle slots; in
        each group, adapters that no request waits for come before those that only later requests wait for;
        ``Order`` decides among equals. Adapters in slots whose uid is in ``keep`` stay, because this step
        admits requests to them. Adapters that earlier requests wait for stay too, unless their tenant has
        more than its share, or they are ``offered``: the policy gives their slots to the newcomer.
        """
        here = newcomer.uid in self.entries
        size = 0 if here else self._reserved(newcomer)
        since = newcomer.needed_since
        limit = now if since is None else since
        tiers: dict[tuple[bool, bool, bool, bool], list[AdapterEntry]] = {}
        beyond: set[int] | None = None  # found when it is asked for the first time
        for entry in self.entries.values():
            if entry.running or entry is newcomer or not self._movable(entry):
                continue
            in_slot = entry.location is Location.SLOT
            if in_slot and entry.uid in keep:
                continue
            needed = entry.needed_since
            earlier = needed is not None and (
                needed < limit or (needed == limit and not _later(entry, newcomer))
            )
            if earlier and entry not in offered:
                beyond = self._beyond_their_share(newcomer) if beyond is None else beyond
                if entry.uid not in beyond:
                    continue
            alive = needed is not None or not entry.retired
            tier = earlier, alive, in_slot, needed is not None
            tiers.setdefault(tier, []).append(entry)
        all_ = [entry.uid for tier in tiers.values() for entry in tier]
        if self._lacking(newcomer, size - sum(self._counted[uid] for uid in all_), places=len(all_)):
            return None
        victims: list[AdapterEntry] = []
        in_order = (entry for tier in sorted(tiers) for entry in self._order(tiers[tier]))
        while self._lacking(newcomer, size, places=len(victims)):
            victim = next(in_order)
            size -= self._counted[victim.uid]
            victims.append(victim)
        return victims

    def _beyond_their_share(self, newcomer: AdapterEntry) -> set[int]:
        """Uids of the adapters of tenants that have more than their share of the places.

        None if the tenant that has waited longest for ``newcomer`` has its share.
        """
        if newcomer.head is None:
            return set()
        places: dict[str | None, set[int]] = {newcomer.wanted_by: set()}
        for entry in self.entries.values():
            head = entry.head
            if entry is newcomer or (head is None and not entry.running):
                continue
            who = entry.last_tenant if head is None else head.options.tenant
            if who in places:
                places[who].add(entry.uid)
            else:
                places[who] = {entry.uid}
        share = max(1, self.capacity // len(places))
        if len(places[newcomer.wanted_by]) >= share:
            return set()
        return set().union(*(uids for uids in places.values() if len(uids) > share))

    def _reserved(self, entry: AdapterEntry) -> int:
        """Return the bytes to reserve. An adapter that can never fit is read all the same, and fails when its
        size is known."""
        return entry.nbytes if self.can_ever_hold(entry, entry.nbytes) else 0

    def _lacking(self, newcomer: AdapterEntry, nbytes: int, places: int = 0) -> bool:
        """Whether the cache lacks room after ``nbytes`` more and ``places`` fewer."""
        here = newcomer.uid in self.entries
        if not here and len(self.entries) - places >= self.capacity:
            return True
        return self.max_bytes is not None and self.used_bytes + nbytes > self.max_bytes

    def _count(self, entry: AdapterEntry, nbytes: int) -> None:
        self.used_bytes += nbytes - self._counted.get(entry.uid, 0)
        self._counted[entry.uid] = nbytes
        self._largest = None

    def _movable(self, entry: AdapterEntry) -> bool:
        if entry.stays or entry.running or entry.uid in self.reserved:
            return False
        if entry.location is Location.SLOT:
            return True
        return entry.location is Location.CPU and entry.slot is None  # not being copied to a slot

    def check(self) -> None:
        assert len(self.entries) <= self.capacity
        assert self.entries.keys() == self._counted.keys()
        assert all(e.location is not Location.DISK for e in self.entries.values())
        assert self.used_bytes == sum(self._counted.values())
        assert self.max_bytes is None or self.used_bytes <= self.max_bytes
        for entry in self.entries.values():
            assert entry.location is Location.LOADING or self._counted[entry.uid] == entry.nbytes
