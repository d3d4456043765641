"""Accounting of the CPU adapter cache: which adapters are in it, and which may be evicted.

Adapters in slots stay in the cache too, so that a slot can be given up without a copy back.

An adapter that a request waits for is not evicted, with one exception that keeps the cache fair: a request
that has waited longer may take the place of an adapter that only later requests need. Without the exception,
a few busy adapters could keep a cold one out for ever. A tenant with less than its share of the places may
also take one from a tenant with more, however long the latter has waited.

An adapter's size is known after its first read. Later reads reserve that size beforehand; the first one
reserves only a place, and room for its bytes is made when it arrives.

An adapter that takes several slots of one size takes as many places here. Adapters that were made for one
tenant's requests (``AdapterEntry.owner``) have no more places than its share of the slots: beyond that each
takes the place of another one of that tenant's. So they have no more slots, either. They are made quickly.
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


def _came_before(one: AdapterEntry, other: AdapterEntry) -> bool:
    """Whether the oldest request for ``one`` came before that for ``other``, of the same time. Otherwise both
    could wait for each other's place."""
    return one.head is not None and other.head is not None and one.head.seq < other.head.seq


class CpuCache:
    """Adapters with at most ``capacity`` places, and at most ``max_bytes`` (None: no bound), together."""

    def __init__(
        self,
        capacity: int,
        num_slots: int,
        max_bytes: int | None = None,
        order: Order = least_recently_used,
    ) -> None:
        self.capacity = capacity
        self.num_slots = num_slots
        self.max_bytes = max_bytes
        self.entries: dict[int, AdapterEntry] = {}
        """Adapters that are resident or being read, by uid."""
        self.used = 0
        """Places that these take."""
        self._places: dict[int, int] = {}
        """Places that each counts for in ``used``."""
        self.used_bytes = 0
        self._counted: dict[int, int] = {}
        """Bytes that each counts for in ``used_bytes``."""
        self._largest: int | None = None
        """The largest of those; None when it must be computed again."""
        self._order = order

    @property
    def room(self) -> int:
        """Number of adapters of one place that fit without an eviction, each with as many bytes as the
        largest known one."""
        places = self.capacity - self.used
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
        return not self._lacking(entry, self._reserved(entry)) and self._beyond_own_share(entry) <= 0

    def add(self, entry: AdapterEntry) -> None:
        assert self.fits(entry) and entry.uid not in self.entries
        self.entries[entry.uid] = entry
        self._count(entry, self._reserved(entry), self._places_for(entry))

    def resize(self, entry: AdapterEntry) -> bool:
        """Set the adapter's size, now that it is known; returns whether the bounds still hold."""
        self._count(entry, entry.nbytes, entry.places)
        return not self._lacking(entry, 0)

    def remove(self, entry: AdapterEntry) -> None:
        self._count(entry, 0, 0)
        del self.entries[entry.uid], self._counted[entry.uid], self._places[entry.uid]
        self._largest = None

    def pinned_bytes(self, besides: AdapterEntry) -> int:
        """Return the bytes of the pinned adapters but one."""
        return sum(e.nbytes for e in self.entries.values() if e.pinned and e is not besides)

    def pinned_places(self, besides: AdapterEntry) -> int:
        """Return the places of the pinned adapters but one."""
        return sum(e.places for e in self.entries.values() if e.pinned and e is not besides)

    def can_ever_hold(self, entry: AdapterEntry, nbytes: int) -> bool:
        return self.max_bytes is None or nbytes + self.pinned_bytes(entry) <= self.max_bytes

    def refusal(self, entry: AdapterEntry, nbytes: int, places: int) -> AdapterTooLarge | None:
        """Return the reason why the adapter, with so many bytes and places, can never be kept; None if it
        can."""
        pinned_places = self.pinned_places(entry)
        if places + pinned_places > self.capacity:
            beside = f" beside the {pinned_places} of pinned adapters" if pinned_places else ""
            todo = "raise LoRAConfig.max_cpu_loras" + (" or unpin one" if pinned_places else "")
            return AdapterTooLarge(
                f"it takes {places} places in the CPU cache, and max_cpu_loras={self.capacity} has no room "
                f"for that{beside}; {todo}",
                name=entry.label,
                path=entry.path,
            )
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

        The newcomer may be in the cache already; then only its size can be too large. Where its owner would
        have more than its share, that owner's adapters go first.

        Adapters that are unloaded go first. Then adapters outside the slots, then those in idle slots; in
        each group, adapters that no request waits for come before those that only later requests wait for;
        ``Order`` decides among equals. Adapters in slots whose uid is in ``keep`` stay, because this step
        admits requests to them. Adapters that earlier requests wait for stay too, unless their tenant has
        more than its share, or they are ``offered``: the policy gives their slots to the newcomer.
        """
        here = newcomer.uid in self.entries
        size = 0 if here else self._reserved(newcomer)
        excess = self._beyond_own_share(newcomer)
        since = newcomer.needed_since
        limit = now if since is None else since
        tiers: dict[tuple[bool, ...], list[AdapterEntry]] = {}
        beyond: set[int] | None = None  # found when it is asked for the first time
        for entry in self.entries.values():
            if entry.running or entry is newcomer or not self._movable(entry):
                continue
            in_slot = entry.location is Location.SLOT
            if in_slot and entry.uid in keep:
                continue
            needed = entry.needed_since
            earlier = needed is not None and (
                needed < limit or (needed == limit and not _came_before(newcomer, entry))
            )
            if earlier and entry not in offered:
                beyond = self._beyond_their_share(newcomer) if beyond is None else beyond
                if entry.uid not in beyond:
                    continue
            alive = needed is not None or not entry.retired
            others = excess > 0 and entry.owner != newcomer.owner
            tier = others, earlier, alive, in_slot, needed is not None
            tiers.setdefault(tier, []).append(entry)
        all_ = [entry.uid for tier in tiers.values() for entry in tier]
        most, every = sum(map(self._counted.__getitem__, all_)), sum(map(self._places.__getitem__, all_))
        if self._lacking(newcomer, size - most, every):
            return None
        victims: list[AdapterEntry] = []
        freed = 0
        for victim in (entry for tier in sorted(tiers) for entry in self._order(tiers[tier])):
            if excess <= 0 and not self._lacking(newcomer, size, freed):
                return victims
            if excess > 0 and victim.owner != newcomer.owner:
                return None
            size -= self._counted[victim.uid]
            freed += self._places[victim.uid]
            excess -= self._places[victim.uid]
            victims.append(victim)
        return victims if excess <= 0 else None

    def _beyond_own_share(self, newcomer: AdapterEntry) -> int:
        """Return how many places the owner of ``newcomer`` must give up for it, to have no more than its
        share; if need be, all that it has."""
        if newcomer.owner is None:
            return 0
        tenants, own = {newcomer.owner.tenant}, 0
        for entry in self.entries.values():
            if entry.owner == newcomer.owner:
                own += 0 if entry is newcomer else self._places[entry.uid]
            elif entry.wanted_by is not None:
                tenants.add(entry.wanted_by)
        return min(own, own + newcomer.places - self.num_slots // len(tenants))

    def _beyond_their_share(self, newcomer: AdapterEntry) -> set[int]:
        """Return the uids of the adapters of tenants that have more than their share of the places; none if
        the tenant that has waited longest for ``newcomer`` has its share."""
        if newcomer.head is None:
            return set()
        of_tenant: dict[str | None, list[int]] = {newcomer.wanted_by: []}
        for entry in self.entries.values():
            if entry is not newcomer and (entry.head is not None or entry.running):
                of_tenant.setdefault(entry.wanted_by, []).append(entry.uid)
        used = {who: sum(map(self._places.__getitem__, uids)) for who, uids in of_tenant.items()}
        share = max(1, self.capacity // len(used))
        if used[newcomer.wanted_by] >= share:
            return set()
        return {uid for who, uids in of_tenant.items() if used[who] > share for uid in uids}

    def _reserved(self, entry: AdapterEntry) -> int:
        """Return the bytes to reserve. An adapter that can never fit is read all the same, and fails when its
        size is known."""
        return entry.nbytes if self.can_ever_hold(entry, entry.nbytes) else 0

    def _places_for(self, entry: AdapterEntry) -> int:
        """Return the places to reserve, as :meth:`_reserved`."""
        return entry.places if entry.places + self.pinned_places(entry) <= self.capacity else 1

    def _lacking(self, newcomer: AdapterEntry, nbytes: int, places: int = 0) -> bool:
        """Whether the cache lacks room for ``newcomer`` after ``nbytes`` more and ``places`` fewer."""
        more = 0 if newcomer.uid in self.entries else self._places_for(newcomer)
        if self.used + more - places > self.capacity:
            return True
        return self.max_bytes is not None and self.used_bytes + nbytes > self.max_bytes

    def _count(self, entry: AdapterEntry, nbytes: int, places: int) -> None:
        self.used_bytes += nbytes - self._counted.get(entry.uid, 0)
        self._counted[entry.uid] = nbytes
        self.used += places - self._places.get(entry.uid, 0)
        self._places[entry.uid] = places
        self._largest = None

    def _movable(self, entry: AdapterEntry) -> bool:
        if entry.pinned or entry.running:
            return False
        if entry.location is Location.SLOT:
            return True
        return entry.location is Location.CPU and entry.slot is None  # not being copied to a slot

    def check(self) -> None:
        assert self.used == sum(self._places.values()) <= self.capacity
        assert self.entries.keys() == self._counted.keys() == self._places.keys()
        assert all(e.location is not Location.DISK for e in self.entries.values())
        assert self.used_bytes == sum(self._counted.values())
        assert self.max_bytes is None or self.used_bytes <= self.max_bytes
        for entry in self.entries.values():
            assert entry.location is Location.LOADING or self._counted[entry.uid] == entry.nbytes
