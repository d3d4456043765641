"""Carries out a decision's slot and cache items after checking them, and places pinned adapters."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from aioengine.core.adapters.arena import find_room
from aioengine.core.adapters.residency import Residency
from aioengine.core.adapters.slots import Slot
from aioengine.core.adapters.version import State
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
        self._given: list[Slot] | None = None
        """The slots that the decision gives up and that may be emptied; None until they are needed."""

    # Pinned adapters

    def place_pinned(self, now: float) -> None:
        """Place each pinned adapter as soon as a slot can be had, whether or not the policy asks for it. If
        none can, those of the least busy neighbours that have room for it are closed: they admit no requests
        until they are idle. Otherwise steady traffic would keep the adapter out for ever. One that other
        pinned adapters leave no room for fails."""
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
                    self._residency.fail(entry, now, entry.too_large(text), "too_large")
                continue
            held = [slot.entry for slot in self._slots.slots if slot.entry is not None]
            # Old versions that accepted requests still wait for stay.
            keep = {other.uid for other in held if other.retired and other.waiting}
            idle = self._slots.victims(keep)
            if now < _retry_at(entry) or self._start(entry, None, idle, now) is None:
                continue
            may_close = [e for e in held if e.state is State.IN_SLOT and not e.pinned and e.uid not in keep]
            may_close.sort(key=lambda other: other.running)
            uids = {self._slots.slot_of(other).offset: other.uid for other in may_close}
            offsets = [offset for offset in uids if offset is not None]
            leaving = find_room(arena, entry.slot_nbytes, offsets)
            self.closed.update(uids[offset] for offset in leaving or offsets[:1])

    def next_retry(self, now: float) -> float | None:
        """Return when a pinned adapter whose copy has failed may be copied again; None if there is none."""
        return min((at for at in map(_retry_at, self._pinned_outside()) if at > now), default=None)

    def _pinned_outside(self) -> Sequence[AdapterEntry]:
        """Return the pinned adapters that wait for a slot, in the order in which they were read."""
        if not self._residency.names.pinned:
            return ()
        return [e for e in self._residency.cpu.entries.values() if e.pinned and e.state is State.ON_CPU]

    def shut_out(self, entries: Iterable[AdapterEntry | None]) -> list[tuple[AdapterEntry, EngineOverloaded]]:
        """Return the adapters outside the slots that can never get one as long as the pinned adapters stay,
        and the reasons."""
        room = self._slots.room_beside_pinned()
        pinned = ", ".join(s.entry.label for s in self._slots.slots if s.entry is not None and s.entry.pinned)
        found: list[tuple[AdapterEntry, EngineOverloaded]] = []
        for entry in entries:
            if entry is None or entry.slot is not None:
                continue
            if self._slots.arena.rounded(entry.slot_nbytes) > room:
                where, setting = "every slot holds a pinned adapter", "max_loras"
                if room > 0:
                    where = f"it takes {entry.slot_nbytes:,} bytes, and pinned adapters leave {room:,}"
                    setting = "slot_memory"
                why = f"cannot get a slot, because {where} ({pinned})"
                found.append((entry, entry.shut_out(why, f"unpin one, or raise LoRAConfig.{setting}")))
        return found

    # Decisions

    def apply(self, decision: Resolved, now: float) -> None:
        """Start what can be started of ``place`` and ``prefetch``, in order, but nothing in the places of
        adapters that the same decision admits requests to; and empty the slots of those in ``discard``."""
        if not (self._residency.wanted or decision.place or decision.prefetch or decision.discard):
            return  # as in most steps
        admitting = {request.adapter.uid for request in decision.admit if request.adapter is not None}
        self._residency.start_wanted(now, admitting, waited=WANT_PATIENCE_SECONDS)
        self._given = None
        for entry, place in decision.place:
            reason = self._place(entry, place, decision.evict, now, admitting)
            if reason is not None:
                self._guard.refuse(reason, entry.name)
        for entry in decision.prefetch:
            self._residency.start_load(entry, now, admitting)
        self._residency.start_wanted(now, admitting)
        for slot in self._takable(decision.discard, admitting, "discard"):
            self._slots.evict(slot, now)

    def _takable(self, entries: Iterable[AdapterEntry], admitting: Collection[int], item: str) -> list[Slot]:
        """Return the slots of those of a decision's adapters that may leave; the others in slots are
        refused."""
        found: list[Slot] = []
        for entry in dict.fromkeys(entries):
            if entry.slot is not None:
                slot = self._slots.slot_of(entry)
                reason = slot.why_not(admitting)
                if reason is None:
                    found.append(slot)
                else:
                    self._guard.refuse(f"{item}_{reason}", entry.name)
        return found

    def _place(
        self,
        entry: AdapterEntry,
        place: Place,
        evict: Sequence[AdapterEntry],
        now: float,
        admitting: Collection[int],
    ) -> str | None:
        """Begin to place an adapter, or to read it. Returns the reason why that may not be."""
        if entry.slot is not None:
            return "place_already_placed"
        slots = self._slots.slots
        if place.slot is None:
            slot = next((slot for slot in slots if slot.entry is None), None)
        else:
            slot = slots[place.slot] if 0 <= place.slot < len(slots) else None
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
            if (reason := slot.why_not(admitting)) is not None:
                return f"place_slot_{reason}"
        order: list[Slot] = []
        if slot is None or slot.entry is not None or not self._slots.arena.fits(entry.slot_nbytes):
            if self._given is None:
                self._given = self._takable(evict, admitting, "evict")
            order = [s for s in self._given if s.entry is not None and s.why_not(admitting) is None]
            # With a slot of its own, the decision counts on nobody else's that requests wait for.
            others = self._slots.victims(admitting)
            order += [
                s for s in others if place.slot is None or (s.entry is not None and not s.entry.waiting)
            ]
        return self._start(entry, slot, list(dict.fromkeys(order)), now)

    def _start(self, entry: AdapterEntry, slot: Slot | None, order: Sequence[Slot], now: float) -> str | None:
        """Begin a copy into ``slot``; None: into a free one, or one that has to be emptied. As many slots of
        ``order`` are emptied as that takes. Returns the reason if the copy cannot begin."""
        slot = slot or next((free for free in self._slots.slots if free.entry is None), None)
        if slot is None and not order:
            return "place_no_slot"
        arena = self._slots.arena
        if slot is not None and slot.offset is not None:
            arena = arena.of(offset for offset in arena.regions if offset != slot.offset)
        by_offset = {other.offset: other for other in order if other is not slot and other.offset is not None}
        offsets = find_room(arena, entry.slot_nbytes, list(by_offset))
        if offsets is None:
            return "place_no_room"
        leaving = [by_offset[offset] for offset in offsets]
        if slot is None:
            leaving = leaving or [order[0]]
            slot = leaving[0]
        elif slot.entry is not None:
            leaving.append(slot)
        for other in leaving:
            self._slots.evict(other, now)
        self._slots.start_copy(entry, slot, now)
        return None


def _retry_at(entry: AdapterEntry) -> float:
    """Return when a pinned adapter may be copied. The pause keeps a copy that always fails from running on
    and on."""
    return 0.0 if entry.copy_failed is None else entry.copy_failed + PIN_RETRY_SECONDS
