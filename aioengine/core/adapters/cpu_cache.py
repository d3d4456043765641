"""Accounting of the CPU adapter cache: which adapters are in it, and which may be evicted.

Adapters in slots stay in the cache too, so that a slot can be given up without a copy back.

An adapter that a request waits for is evicted only for a request that has waited longer. Without that, a few
busy adapters could keep a cold one out for ever. A tenant with less than its share of the places may also
take one from a tenant with more, however long the latter has waited.

An adapter's size is known after its first read. Later reads reserve that size beforehand; the first one
reserves only a place, and room for its bytes is made when it arrives.

An adapter that takes several slots of one size takes as many places here. Adapters that were made for one
tenant's requests (``AdapterEntry.owner``) have no more places than its share of the slots: beyond that each
takes the place of another one of that tenant's. So they have no more slots, either. They are made quickly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

from aioengine import events
from aioengine.core.adapters.moves import DropMove, Move
from aioengine.core.adapters.version import State
from aioengine.core.guard import PolicyGuard
from aioengine.core.limits import CoreLimits
from aioengine.core.state import AdapterEntry
from aioengine.errors import AdapterTooLarge
from aioengine.schedulers.policy import Location

Order = Callable[[Sequence[AdapterEntry]], Sequence[AdapterEntry]]
"""Decides which of several equally evictable adapters is evicted first."""


class Share(NamedTuple):
    """What an adapter counts for in the cache."""

    nbytes: int = 0
    places: int = 0


_NOTHING = Share()


class CpuCache:
    """Adapters with at most ``cpu_capacity`` places, and at most ``cpu_max_bytes`` (None: no bound),
    together."""

    def __init__(self, limits: CoreLimits, order: Order, moves: list[Move], guard: PolicyGuard) -> None:
        self.capacity = limits.cpu_capacity
        self.max_bytes = limits.cpu_max_bytes
        self.entries: dict[int, AdapterEntry] = {}
        """Adapters that are resident or being read, by uid."""
        self.used = _NOTHING
        """What these take together."""
        self._num_slots = limits.num_slots
        self._shares: dict[int, Share] = {}
        self._order = order
        self._moves = moves
        self._guard = guard

    @property
    def room(self) -> int:
        """Number of adapters of one place that fit without an eviction, each with as many bytes as the
        largest known one."""
        places, left = self.capacity - self.used.places, self.bytes_room
        if left is None or not places:
            return places
        largest = max((share.nbytes for share in self._shares.values()), default=0)
        return min(places, left // largest) if largest > 0 else places

    @property
    def bytes_room(self) -> int | None:
        """Bytes that are free; None where their number is not bounded."""
        return None if self.max_bytes is None else self.max_bytes - self.used.nbytes

    def fits(self, entry: AdapterEntry) -> bool:
        """Whether the adapter can be added now without an eviction or, if it is here, can stay."""
        return self._has_room(self._more(entry)) and self._beyond_own_share(entry) <= 0

    def add(self, entry: AdapterEntry) -> None:
        assert entry.uid not in self.entries
        share = self._more(entry)
        self.entries[entry.uid] = entry
        self._count(entry, share)

    def resize(self, entry: AdapterEntry) -> None:
        """Set the adapter's size, now that it is known. The bounds may not hold then."""
        self._count(entry, Share(entry.nbytes, entry.places))

    def remove(self, entry: AdapterEntry) -> None:
        self._count(entry, _NOTHING)
        del self.entries[entry.uid], self._shares[entry.uid]

    def evict(self, entry: AdapterEntry, now: float) -> None:
        """Remove an adapter that has been read, and free its memory."""
        entry.change("drop")
        self.remove(entry)
        self._moves.append(DropMove(entry))
        if entry.published:
            self._guard.tell("adapter_dropped", now, adapter=entry.name)
        self._guard.say(events.AdapterEvicted, entry, now, level="cpu", slot=None, nbytes=entry.nbytes)

    def _pinned(self, besides: AdapterEntry) -> Share:
        """Return what the pinned adapters but one take."""
        return self._sum(entry for entry in self.entries.values() if entry.pinned and entry is not besides)

    def refusal(self, entry: AdapterEntry, nbytes: int, places: int) -> AdapterTooLarge | None:
        """Return the reason why the adapter, with so many bytes and places, can never be kept; None if it
        can."""
        pinned = self._pinned(entry)
        for unit, where, takes, most, held, setting in (
            ("places", " in the CPU cache", places, self.capacity, pinned.places, "max_cpu_loras"),
            ("bytes", " of CPU memory", nbytes, self.max_bytes, pinned.nbytes, "max_cpu_lora_bytes"),
        ):
            if most is not None and takes + held > most:
                beside = f" beside the {held:,} {unit} of pinned adapters" if held else ""
                todo = f"raise LoRAConfig.{setting}" + (" or unpin one" if held else "")
                text = f"{takes:,} {unit}{where}, and {setting}={most:,} has no room for that{beside}; {todo}"
                return entry.too_large(text)
        return None

    def victims(
        self,
        newcomer: AdapterEntry,
        now: float,
        keep: Collection[int],
        offered: Collection[AdapterEntry] = (),
    ) -> list[AdapterEntry] | None:
        """Return the adapters to evict, in order, so that ``newcomer`` fits; None if it cannot fit now. It
        may be in the cache already; then only its size can be too large.

        Where its owner would have more than its share, that owner's adapters go first. Then those that are
        unloaded, those outside the slots, and those in idle slots; in each group, those that no request waits
        for come before those that later requests wait for, and ``Order`` decides among equals. Those in slots
        whose uid is in ``keep`` stay, because this step admits requests to them. Those that earlier requests
        wait for stay too, unless their tenant has more than its share, or they are ``offered``: the policy
        gives their slots to the newcomer.
        """
        more, excess = self._more(newcomer), self._beyond_own_share(newcomer)
        head = newcomer.waiting.head
        limit = now if newcomer.needed_since is None else newcomer.needed_since
        tiers: dict[tuple[bool, ...], list[AdapterEntry]] = {}
        beyond: set[int] | None = None  # found when it is asked for the first time
        for entry in self.entries.values():
            in_slot, needed = entry.state is State.IN_SLOT, entry.needed_since
            resident = in_slot or entry.state is State.ON_CPU
            if entry is newcomer or entry.pinned or entry.running or not resident:
                continue
            if in_slot and entry.uid in keep:
                continue
            earlier = needed is not None and needed <= limit
            if earlier and needed == limit and head is not None and entry.waiting.head is not None:
                # Of the same time: otherwise both could wait for each other's place.
                earlier = entry.waiting.head.seq < head.seq
            if earlier and entry not in offered:
                beyond = self._beyond_their_share(newcomer) if beyond is None else beyond
                if entry.uid not in beyond:
                    continue
            alive = needed is not None or not entry.retired
            others = excess > 0 and entry.owner != newcomer.owner
            tiers.setdefault((others, earlier, alive, in_slot, needed is not None), []).append(entry)
        if not self._has_room(more, self._sum(entry for tier in tiers.values() for entry in tier)):
            return None
        victims: list[AdapterEntry] = []
        for victim in (entry for tier in sorted(tiers) for entry in self._order(tiers[tier])):
            if excess <= 0 and self._has_room(more, self._sum(victims)):
                return victims
            if excess > 0 and victim.owner != newcomer.owner:
                return None
            excess -= self._shares[victim.uid].places
            victims.append(victim)
        return victims if excess <= 0 else None

    def _sum(self, entries: Iterable[AdapterEntry]) -> Share:
        shares = [self._shares[entry.uid] for entry in entries]
        return Share(sum(share.nbytes for share in shares), sum(share.places for share in shares))

    def _beyond_own_share(self, newcomer: AdapterEntry) -> int:
        """Return how many places the owner of ``newcomer`` must give up for it, to have no more than its
        share; if need be, all that it has."""
        if newcomer.owner is None:
            return 0
        tenants, own = {newcomer.owner.tenant}, 0
        for entry in self.entries.values():
            if entry.owner == newcomer.owner:
                own += 0 if entry is newcomer else self._shares[entry.uid].places
            elif entry.wanted_by is not None:
                tenants.add(entry.wanted_by)
        return min(own, own + newcomer.places - self._num_slots // len(tenants))

    def _beyond_their_share(self, newcomer: AdapterEntry) -> set[int]:
        """Return the uids of the adapters of tenants that have more than their share of the places; none if
        the tenant that has waited longest for ``newcomer`` has its share."""
        if newcomer.waiting.head is None:
            return set()
        used = Counter({newcomer.wanted_by: 0})
        needed = [e for e in self.entries.values() if e is not newcomer and (e.waiting or e.running)]
        for entry in needed:
            used[entry.wanted_by] += self._shares[entry.uid].places
        share = max(1, self.capacity // len(used))
        if used[newcomer.wanted_by] >= share:
            return set()
        return {entry.uid for entry in needed if used[entry.wanted_by] > share}

    def _more(self, entry: AdapterEntry) -> Share:
        """Return what an adapter that is to be read takes; nothing more if it is here. One that can never fit
        is read all the same, and fails when its size is known."""
        if entry.uid in self.entries:
            return _NOTHING
        pinned, nbytes, places = self._pinned(entry), entry.nbytes, entry.places
        if self.max_bytes is not None and nbytes + pinned.nbytes > self.max_bytes:
            nbytes = 0
        return Share(nbytes, places if places + pinned.places <= self.capacity else 1)

    def _has_room(self, more: Share, fewer: Share = _NOTHING) -> bool:
        """Whether the bounds hold with ``more`` in the cache, and ``fewer`` of what is there."""
        if self.used.places + more.places - fewer.places > self.capacity:
            return False
        return self.max_bytes is None or self.used.nbytes + more.nbytes - fewer.nbytes <= self.max_bytes

    def _count(self, entry: AdapterEntry, share: Share) -> None:
        before, (nbytes, places) = self._shares.get(entry.uid, _NOTHING), self.used
        self._shares[entry.uid] = share
        self.used = Share(nbytes + share.nbytes - before.nbytes, places + share.places - before.places)

    def check(self) -> None:
        assert self.entries.keys() == self._shares.keys()
        assert self.used == self._sum(self.entries.values()) and self._has_room(_NOTHING)
        for uid, entry in self.entries.items():
            assert entry.location is not Location.DISK
            assert entry.location is Location.LOADING or self._shares[uid].nbytes == entry.nbytes
