"""Carries out a decision's slot and cache items after checking them, and places pinned adapters."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain

from aioengine.core.adapters.arena import find_room
from aioengine.core.adapters.residency import Residency
from aioengine.core.adapters.slots import Slot, SlotTable, may_leave
from aioengine.core.guard import Resolved
from aioengine.core.state import AdapterEntry, Request
from aioengine.errors import EngineOverloaded
from aioengine.schedulers.policy import Location, Place

WANT_PATIENCE_SECONDS = 1.0
"""Reads that a caller asked for by name start after those of the policy's decision. After this many seconds
they start before these, because a policy that always has something to read could delay them for ever."""
PIN_RETRY_SECONDS = 1.0
"""Seconds before a pinned adapter is copied again after its copy into a slot failed."""

Refusal = tuple[str, str]
"""(reason, item) of an item of a decision that would break an invariant."""


class Placing:
    """Turns decisions into the moves of a ``Residency``."""

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._slots = residency.slots
        self._closed: set[int] = set()
        self._pinned_wait = False

    def is_closed(self, request: Request) -> bool:
        """Whether its slot admits no requests, because a pinned adapter waits for it."""
        return request.adapter is not None and request.adapter.uid in self._closed

    @property
    def pinned_wait(self) -> bool:
        """Whether a pinned adapter was in no slot at the last call of :meth:`place_pinned`."""
        return self._pinned_wait

    @property
    def any_closed(self) -> bool:
        return bool(self._closed)

    def place_pinned(self, now: float) -> None:
        """Place each pinned adapter as soon as a slot can be had, whether or not the policy asks for it. If
        no slot is idle, one is closed: it admits no requests until it is idle. Otherwise steady traffic would
        keep the adapter out for ever. One that other pinned adapters leave no room for fails."""
        self._closed.clear()
        self._pinned_wait = False
        for entry in self._pinned_outside():
            self._pinned_wait = True
            room = self._slots.room_beside_pinned()
            if self._slots.arena.rounded(entry.slot_nbytes) > room:
                if entry.error is None:
                    self._residency.pin_refused(entry, now, room)
            elif now >= _retry_at(entry):
                keep = self._slots.superseded()
                if self._start(entry, None, (), self._slots.victims(keep), (), keep, now) is not None:
                    self._close_for(entry, keep)

    def _close_for(self, entry: AdapterEntry, keep: set[int]) -> None:
        """Close the slots of the least busy adapters, as many as the bytes of ``entry`` take."""
        arena = self._slots.arena
        victims = (slot.entry for slot in self._slots.victims(keep))
        idle = sum(arena.rounded(entry.slot_nbytes) for entry in victims if entry is not None)
        missing = max(arena.rounded(entry.slot_nbytes) - arena.free - idle, 1)
        while missing > 0 and (busy := self._slots.least_busy(self._closed | keep)) is not None:
            self._closed.add(busy)
            missing -= arena.rounded(self._residency.entries[busy].slot_nbytes)

    def next_retry(self, now: float) -> float | None:
        """Return when a pinned adapter whose copy has failed may be copied again; None if there is none."""
        return min((at for at in map(_retry_at, self._pinned_outside()) if at > now), default=None)

    def _pinned_outside(self) -> Sequence[AdapterEntry]:
        """Return the pinned adapters that wait for a slot, in the order in which they were read."""
        if not self._residency.pins.count:
            return ()
        return [entry for entry in self._residency.cpu.entries.values() if _waits_for_slot(entry)]

    def apply(self, decision: Resolved, now: float) -> list[Refusal]:
        """Start what can be started of ``place`` and ``prefetch``, in order, but nothing in the places of
        adapters that the same decision admits requests to. Returns what was refused."""
        refused: list[Refusal] = []
        if not self._residency.any_wanted and not decision.moves:
            return refused  # as in most steps
        admitting = {request.adapter.uid for request in decision.admit if request.adapter is not None}
        self._residency.start_wanted(now, admitting, waited=WANT_PATIENCE_SECONDS)
        given = _GivenUp(decision.evict, self._slots, admitting, refused)
        for entry, place in decision.place:
            reason = self._place(entry, place, now, admitting, given)
            if reason is not None:
                refused.append((reason, entry.name))
        for entry in decision.prefetch:
            if entry.location is Location.DISK:
                self._residency.start_load(entry, now, admitting)
        self._residency.start_wanted(now, admitting)
        refused += self._discard(decision.discard, now, admitting)
        return refused

    def _discard(self, entries: Sequence[AdapterEntry], now: float, admitting: set[int]) -> list[Refusal]:
        """Empty the slots of these adapters. Returns those that may not leave; those in no slot are
        skipped."""
        refused: list[Refusal] = []
        for entry in entries:
            if entry.slot is None:
                continue
            slot = self._slots.slots[entry.slot]
            reason = _not_takable(slot, admitting)
            if reason is None:
                self._residency.evict_slot(slot, now)
            else:
                refused.append((f"discard{reason.removeprefix('place_slot')}", entry.name))
        return refused

    def _place(
        self, entry: AdapterEntry, place: Place, now: float, admitting: set[int], given: _GivenUp
    ) -> str | None:
        if entry.slot is not None:
            return "place_already_placed"
        if entry.location is not Location.CPU:
            if entry.location is Location.DISK:
                self._residency.start_load(entry, now, admitting, self._offered(place, given))
            return None
        slot: Slot | None = None
        if place.slot is not None:
            if not 0 <= place.slot < len(self._slots.slots):
                return "place_slot_unknown"
            slot = self._slots.slots[place.slot]
            reason = _not_takable(slot, admitting)
            if reason is not None:
                return reason

        others = given.others()
        unwanted = (s for s in others if s.entry is not None and not s.entry.waiting)
        wanted: Iterable[Slot] = ()
        if place.slot is None:  # or the decision counts on nobody else's slot
            wanted = (s for s in given.others() if s.entry is not None and s.entry.waiting)
        return self._start(entry, slot, given.slots(), unwanted, wanted, admitting, now)

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
        given, others, last = iter(given), iter(others), iter(last)
        victims = chain(given, others)
        slot = slot or self._slots.free_slot or next(victims, None) or next(last, None)
        if slot is None:
            return "place_no_slot"
        arena = self._slots.arena
        leaving = [] if slot.offset is None else [slot.offset]
        by_offset = {s.offset: s for s in self._slots.slots if s.offset is not None}

        def may_move(offset: int) -> bool:
            return by_offset[offset].idle and may_leave(by_offset[offset], keep)

        first: list[int] = []
        wanted: list[int] = []
        if leaving or not arena.fits(entry.slot_nbytes):
            first = [s.offset for s in dict.fromkeys(victims) if s is not slot and s.offset is not None]
            wanted = [s.offset for s in last if s is not slot and s.offset is not None]
            wanted = [offset for offset in wanted if offset not in first]
        room = find_room(arena, entry.slot_nbytes, leaving, first, wanted, may_move)
        if room is None:
            return "place_no_room"
        for offset in room.evict:
            self._residency.evict_slot(by_offset[offset], now)
        self._residency.start_copy(entry, slot, now, room.move)
        return None

    def _offered(self, place: Place, given: _GivenUp) -> Collection[AdapterEntry]:
        """Return the adapters whose slots the policy gives to the newcomer: they may leave the CPU cache,
        too. Otherwise each could wait for the other for ever."""
        if place.slot is None:
            return [entry for entry in given.entries if entry.slot is not None]
        known = 0 <= place.slot < len(self._slots.slots)
        entry = self._slots.slots[place.slot].entry if known else None
        return () if entry is None else (entry,)


class _GivenUp:
    """The slots that a decision gives up, in its order. A slot that it may not give up is refused, once."""

    def __init__(
        self, entries: Sequence[AdapterEntry], slots: SlotTable, admitting: set[int], refused: list[Refusal]
    ) -> None:
        self.entries = entries
        self._slots = slots
        self._admitting = admitting
        self._refused = refused
        self._told: set[int] = set()
        self._others: list[Slot] | None = None

    def others(self) -> Iterator[Slot]:
        """Yield all slots that may be emptied, in the core's order."""
        if self._others is None:
            self._others = self._slots.victims(self._admitting)
        yield from (slot for slot in self._others if slot.idle)

    def slots(self) -> Iterator[Slot]:
        """Yield the slots that may be emptied now. A request may have started in one since the policy
        decided."""
        for entry in self.entries:
            if entry.slot is None:
                continue
            slot = self._slots.slots[entry.slot]
            reason = _not_takable(slot, self._admitting)
            if reason is None:
                yield slot
            elif entry.uid not in self._told:
                self._told.add(entry.uid)
                self._refused.append((f"evict{reason.removeprefix('place_slot')}", entry.name))


def _waits_for_slot(entry: AdapterEntry) -> bool:
    return entry.pinned and entry.slot is None and entry.location is Location.CPU


def _retry_at(entry: AdapterEntry) -> float:
    """Return when a pinned adapter may be copied. The pause keeps a copy that always fails from running on
    and on."""
    return 0.0 if entry.copy_failed is None else entry.copy_failed + PIN_RETRY_SECONDS


def _not_takable(slot: Slot, admitting: set[int]) -> str | None:
    if slot.entry is None:
        return None
    if slot.loading:
        return "place_slot_loading"
    if slot.entry.running:
        return "place_slot_busy"
    if slot.entry.pinned:
        return "place_slot_pinned"
    return "place_slot_admitted" if slot.entry.uid in admitting else None


def adapters_shut_out(
    entries: Iterable[AdapterEntry | None], slots: SlotTable
) -> list[tuple[AdapterEntry, EngineOverloaded]]:
    """Return the adapters outside the slots that can never get one as long as the pinned adapters stay, and
    the reasons."""
    room = slots.room_beside_pinned()
    pinned = ", ".join(s.entry.label for s in slots.slots if s.entry is not None and s.entry.pinned)
    found: list[tuple[AdapterEntry, EngineOverloaded]] = []
    for entry in entries:
        if entry is None or entry.slot is not None or slots.arena.rounded(entry.slot_nbytes) <= room:
            continue
        where, setting = "every slot holds a pinned adapter", "max_loras"
        if room > 0:
            where = f"it takes {entry.slot_nbytes:,} bytes, and pinned adapters leave {room:,} at a place"
            setting = "slot_memory"
        text = f"adapter {entry.label!r} ({entry.path}) cannot get a slot, because {where} "
        text += f"({pinned}); unpin one, or raise LoRAConfig.{setting}"
        found.append((entry, EngineOverloaded(text, bound="pinned")))
    return found
