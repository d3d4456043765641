"""Carries out a decision's slot and cache items after checking them, and places pinned adapters."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain

from aioengine.core.adapters.arena import find_room
from aioengine.core.adapters.failures import shut_out, too_large
from aioengine.core.adapters.residency import Residency
from aioengine.core.adapters.slots import Slot, SlotTable
from aioengine.core.guard import PolicyGuard, Resolved
from aioengine.core.state import AdapterEntry
from aioengine.errors import EngineOverloaded
from aioengine.schedulers.policy import Location, Place

WANT_PATIENCE_SECONDS = 1.0
"""Reads that a caller asked for by name start after those of the policy's decision. After this many seconds
they start before these, because a policy that always has something to read could delay them for ever."""
PIN_RETRY_SECONDS = 1.0
"""Seconds before a pinned adapter is copied again after its copy into a slot failed."""


class Placing:
    """Turns decisions into the moves of a ``Residency``. Refused items are told to ``guard``."""

    def __init__(self, residency: Residency, guard: PolicyGuard) -> None:
        self._residency = residency
        self._slots = residency.slots
        self._guard = guard
        self.closed: set[int] = set()
        """Uids of the adapters whose slots admit no requests, because a pinned adapter waits for them."""
        self.pinned_wait = False
        """Whether a pinned adapter was in no slot at the last call of :meth:`place_pinned`."""

    def place_pinned(self, now: float) -> None:
        """Place each pinned adapter as soon as a slot can be had, whether or not the policy asks for it. If
        no slot is idle, those of the least busy adapters are closed, as many as its bytes take: they admit no
        requests until they are idle. Otherwise steady traffic would keep the adapter out for ever. One that
        other pinned adapters leave no room for fails."""
        self.closed.clear()
        outside = self._pinned_outside()
        self.pinned_wait = bool(outside)
        arena = self._slots.arena
        for entry in outside:
            room, size = self._slots.room_beside_pinned(), arena.rounded(entry.slot_nbytes)
            if size > room:
                if entry.error is None:
                    text = f"{entry.slot_nbytes:,} bytes in a slot, and the pinned adapters leave {room:,} "
                    text += "bytes at a place; unpin one, or raise LoRAConfig.slot_memory"
                    self._residency.fail(entry, now, too_large(entry, text), "too_large")
                continue
            keep = self._slots.superseded()
            if (
                now < _retry_at(entry)
                or self._start(entry, None, (), self._slots.victims(keep), (), keep, now) is None
            ):
                continue
            idle = [slot.entry for slot in self._slots.victims(keep) if slot.entry is not None]
            missing = max(size - arena.free - sum(arena.rounded(other.slot_nbytes) for other in idle), 1)
            while missing > 0 and (busy := self._slots.least_busy(self.closed | keep)) is not None:
                self.closed.add(busy.uid)
                missing -= arena.rounded(busy.slot_nbytes)

    def next_retry(self, now: float) -> float | None:
        """Return when a pinned adapter whose copy has failed may be copied again; None if there is none."""
        return min((at for at in map(_retry_at, self._pinned_outside()) if at > now), default=None)

    def _pinned_outside(self) -> Sequence[AdapterEntry]:
        """Return the pinned adapters that wait for a slot, in the order in which they were read."""
        if not self._residency.names.pinned:
            return ()
        cached = self._residency.cpu.entries.values()
        return [e for e in cached if e.pinned and e.slot is None and e.location is Location.CPU]

    def apply(self, decision: Resolved, now: float) -> None:
        """Start what can be started of ``place`` and ``prefetch``, in order, but nothing in the places of
        adapters that the same decision admits requests to; and empty the slots of those in ``discard``."""
        if not self._residency.wanted and not decision.moves:
            return  # as in most steps
        admitting = {request.adapter.uid for request in decision.admit if request.adapter is not None}
        self._residency.start_wanted(now, admitting, waited=WANT_PATIENCE_SECONDS)
        told: set[int] = set()
        for entry, place in decision.place:
            reason = self._place(entry, place, decision.evict, now, admitting, told)
            if reason is not None:
                self._guard.refuse(reason, entry.name)
        for entry in decision.prefetch:
            self._residency.start_load(entry, now, admitting)
        self._residency.start_wanted(now, admitting)
        for entry in decision.discard:
            if entry.slot is None:
                continue
            reason = _not_takable(self._slots.slot_of(entry), admitting)
            if reason is None:
                self._slots.evict(self._slots.slot_of(entry), now)
            else:
                self._guard.refuse(f"discard{reason.removeprefix('place_slot')}", entry.name)

    def _place(
        self,
        entry: AdapterEntry,
        place: Place,
        evict: Sequence[AdapterEntry],
        now: float,
        admitting: set[int],
        told: set[int],
    ) -> str | None:
        """Begin to place an adapter, or to read it. Returns the reason why that may not be."""
        if entry.slot is not None:
            return "place_already_placed"
        known = place.slot is not None and 0 <= place.slot < len(self._slots.slots)
        slot = self._slots.slots[place.slot] if known and place.slot is not None else None
        if entry.location is not Location.CPU:
            # The adapters whose slots the policy gives to the newcomer may leave the CPU cache, too.
            # Otherwise each could wait for the other for ever.
            offered = evict if place.slot is None else [slot.entry if slot is not None else None]
            leaving = [other for other in offered if other is not None and other.slot is not None]
            self._residency.start_load(entry, now, admitting, leaving)
            return None
        if place.slot is not None:
            if slot is None:
                return "place_slot_unknown"
            reason = _not_takable(slot, admitting)
            if reason is not None:
                return reason
        others = self._slots.victims(admitting)
        unwanted = [slot for slot in others if slot.entry is not None and not slot.entry.waiting]
        # With a slot of its own, the decision counts on nobody else's that requests wait for.
        wanted = others[len(unwanted) :] if place.slot is None else ()
        given = self._given_up(evict, admitting, told)
        return self._start(entry, slot, given, unwanted, wanted, admitting, now)

    def _given_up(self, evict: Sequence[AdapterEntry], admitting: set[int], told: set[int]) -> Iterator[Slot]:
        """Yield the slots that a decision gives up, in its order, if they may be emptied now: a request may
        have started in one since the policy decided. The others are refused, once: ``told`` has these."""
        for entry in evict:
            if entry.slot is None:
                continue
            slot = self._slots.slot_of(entry)
            reason = _not_takable(slot, admitting)
            if reason is None:
                yield slot
            elif entry.uid not in told:
                told.add(entry.uid)
                self._guard.refuse(f"evict{reason.removeprefix('place_slot')}", entry.name)

    def _start(
        self,
        entry: AdapterEntry,
        slot: Slot | None,
        given: Iterable[Slot],
        others: Iterable[Slot],
        last: Iterable[Slot],
        keep: set[int],
        now: float,
    ) -> str | None:
        """Begin a copy into ``slot``. None: into a free slot, or else the first of ``given``, ``others`` and
        ``last``. If there is no room for the bytes, more of these slots are emptied, in the same order.
        Returns the reason if the copy cannot begin."""
        victims, last = chain(given, others), iter(last)
        free = (slot for slot in self._slots.slots if slot.entry is None)
        slot = slot or next(free, None) or next(victims, None) or next(last, None)
        if slot is None:
            return "place_no_slot"
        arena = self._slots.arena
        leaving = [] if slot.offset is None else [slot.offset]
        by_offset = {other.offset: other for other in self._slots.slots if other.offset is not None}
        first: list[int] = []
        wanted: list[int] = []
        if leaving or not arena.fits(entry.slot_nbytes):
            first = [s.offset for s in dict.fromkeys(victims) if s is not slot and s.offset is not None]
            wanted = [s.offset for s in last if s is not slot and s.offset is not None]
            wanted = [offset for offset in wanted if offset not in first]
        room = find_room(
            arena, entry.slot_nbytes, leaving, first, wanted, lambda at: by_offset[at].may_leave(keep)
        )
        if room is None:
            return "place_no_room"
        for offset in room.evict:
            self._slots.evict(by_offset[offset], now)
        self._slots.start_copy(entry, slot, now, room.move)
        return None


def _retry_at(entry: AdapterEntry) -> float:
    """Return when a pinned adapter may be copied. The pause keeps a copy that always fails from running on
    and on."""
    return 0.0 if entry.copy_failed is None else entry.copy_failed + PIN_RETRY_SECONDS


def _not_takable(slot: Slot, admitting: Collection[int]) -> str | None:
    """Return the reason if a decision may not empty a slot."""
    if slot.entry is None:
        return None
    if slot.loading:
        return "place_slot_loading"
    if slot.entry.running:
        return "place_slot_busy"
    if slot.pinned:
        return "place_slot_pinned"
    return "place_slot_admitted" if slot.entry.uid in admitting else None


def adapters_shut_out(
    entries: Iterable[AdapterEntry | None], slots: SlotTable
) -> list[tuple[AdapterEntry, EngineOverloaded]]:
    """Return the adapters outside the slots that can never get one as long as the pinned adapters stay, and
    the reasons."""
    room = slots.room_beside_pinned()
    pinned = ", ".join(slot.entry.label for slot in slots.slots if slot.entry is not None and slot.pinned)
    found: list[tuple[AdapterEntry, EngineOverloaded]] = []
    for entry in entries:
        if entry is None or entry.slot is not None or slots.arena.rounded(entry.slot_nbytes) <= room:
            continue
        where, setting = "every slot holds a pinned adapter", "max_loras"
        if room > 0:
            where = f"it takes {entry.slot_nbytes:,} bytes, and pinned adapters leave {room:,} at a place"
            setting = "slot_memory"
        why, todo = (
            f"cannot get a slot, because {where} ({pinned})",
            f"unpin one, or raise LoRAConfig.{setting}",
        )
        found.append((entry, shut_out(entry, why, todo)))
    return found
