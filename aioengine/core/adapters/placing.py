"""Carries out a decision's slot and cache items after checking them, and places pinned adapters and mixes.

The file is long because all of them take slots from each other, by the same rules.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain
from math import inf

from aioengine.core.adapters.arena import rounded
from aioengine.core.adapters.mix import MixEntry
from aioengine.core.adapters.residency import Residency
from aioengine.core.adapters.room import find_room
from aioengine.core.adapters.slots import Slot, SlotTable, may_leave
from aioengine.core.border import Border
from aioengine.core.guard import Resolved
from aioengine.core.state import AdapterEntry, Request
from aioengine.schedulers.policy import Location, Place

WANT_PATIENCE_SECONDS = 1.0
"""Reads that a caller asked for by name start after those of the policy's decision. After this many seconds
they start before these, because a policy that always has something to read could delay them for ever."""
MIX_PATIENCE_SECONDS = 1.0
"""Policies think of one slot at a time. After a request for a mix has waited for this many seconds, the core
brings in the mix's parts itself: the slots that they need are closed, and nobody else gets one, until all are
idle at the same time. The oldest such request comes first, so that none waits for ever."""
PIN_RETRY_SECONDS = 1.0
"""Seconds before a pinned adapter is copied again after its copy into a slot failed."""

Refusal = tuple[str, str]
"""(reason, item) of an item of a decision that would break an invariant."""


class Placing:
    """Turns decisions into the moves of a ``Residency``."""

    def __init__(self, residency: Residency, border: Border | None = None) -> None:
        self._residency = residency
        self._border = border
        """None unless adapters and KV blocks share a memory."""
        self.short: float | None = None
        """Arrival of the oldest request that has waited long and for whose adapter the shared memory had no
        room: sequences of later requests must not take what becomes free. None: there is none."""
        self._slots = residency.slots
        self._closed: set[int] = set()
        self._pinned_wait = False
        self._urgent = False
        self._holding: MixEntry | None = None
        """The mix that slots are kept for."""
        self.mix_due = inf
        """When the next mix will have waited long."""
        self._ready: MixEntry | None = None
        """The first mix that has waited long and whose parts are in slots."""

    def is_closed(self, entry: AdapterEntry | None) -> bool:
        """Whether its slot admits no requests, because a pinned adapter or a mix waits for the slot."""
        return entry is not None and any(member.uid in self._closed for member in entry.members)

    @property
    def any_waits(self) -> bool:
        """Whether a pinned adapter was in no slot at the last call of :meth:`arrange`, or a mix that has
        waited long."""
        return self._pinned_wait or self._urgent

    @property
    def any_closed(self) -> bool:
        return bool(self._closed)

    @property
    def overdue(self) -> Request | None:
        """A request for a mix that has waited long and can be admitted now. It is, whatever the policy says:
        if its slots went to others first, it might never find all of them again."""
        mix = self._ready
        return None if mix is None or mix.location is not Location.SLOT else mix.waiting.head

    def arrange(self, now: float) -> None:
        """Place pinned adapters, and mixes that have waited long, whether or not the policy asks for it."""
        self._closed.clear()
        self._place_pinned(now)
        self._place_mixes(now)

    def _place_pinned(self, now: float) -> None:
        """Place each pinned adapter as soon as a slot can be had, whether or not the policy asks for it. If
        no slot is idle, one is closed: it admits no requests until it is idle. Otherwise steady traffic would
        keep the adapter out for ever. One that other pinned adapters leave no room for fails."""
        self._pinned_wait = False
        for entry in self._pinned_outside():
            self._pinned_wait = True
            room = self._slots.room_beside_pinned()
            if self._slots.arena is not None and rounded(entry.slot_nbytes) > room:
                if entry.error is None:
                    self._residency.pin_refused(entry, now, int(room))
            elif now >= _retry_at(entry):
                keep = self._slots.superseded()
                if self._start(entry, None, (), self._slots.victims(keep), (), keep, now) is not None:
                    self._close_for(entry, keep)

    def _close_for(self, entry: AdapterEntry, keep: set[int]) -> None:
        """Close the slots of the least busy adapters: one, or as many as the bytes of ``entry`` take."""
        arena, missing = self._slots.arena, 1
        if arena is not None:
            idle = sum(rounded(s.entry.slot_nbytes) for s in self._slots.victims(keep) if s.entry is not None)
            missing = max(rounded(entry.slot_nbytes) - arena.free - idle, 1)
        while missing > 0 and (busy := self._slots.least_busy(self._closed)) is not None:
            self._closed.add(busy)
            missing -= 1 if arena is None else rounded(self._residency.entries[busy].slot_nbytes)

    def _place_mixes(self, now: float) -> None:
        """Bring in mixes that have waited long: read their parts, and keep slots for the first whose parts
        have been read."""
        waiting = self._residency.mixes.waiting()
        urgent = [mix for mix in waiting if now >= _urgent_at(mix)]
        self.mix_due = min((at for mix in waiting if (at := _urgent_at(mix)) > now), default=inf)
        self._urgent, self._holding = any(mix.missing for mix in urgent), None
        self._ready = next((mix for mix in urgent if not mix.missing), None)
        reserved: set[int] = set()
        for mix in urgent:
            own = {member.uid for member in mix.members}
            if not reserved and not any(member.stalled for member in mix.members):
                reserved = self._residency.cpu.reserved = own
            if not mix.missing:  # it waits to be admitted
                continue
            refused = [self._residency.start_load(part, now, own) for part in mix.missing]
            if self._holding is None and "cpu_cache_full" in refused:
                self._holding = mix
                self._close_for_all(mix.missing, own | self._wanted_before(mix))
            if self._holding is None and all(part.location is Location.CPU for part in mix.missing):
                before = self._wanted_before(mix)
                if self._start_all(mix, [self._slots.victims(own | before)], before, now) is not None:
                    self._holding = mix
                    # Where slots share a memory, the other parts may have to be moved.
                    self._close_for_all(mix.missing, own | before if self._slots.arena is None else before)
        self._residency.cpu.reserved = reserved

    def _wanted_before(self, mix: MixEntry) -> set[int]:
        """Return the uids of adapters in slots that earlier requests wait for: these run first."""
        held = (slot.entry for slot in self._slots.slots)
        return {entry.uid for entry in held if entry is not None and _is_before(entry.head, mix.head)}

    def _close_for_all(self, parts: Sequence[AdapterEntry], keep: set[int]) -> None:
        """Close the slots of the least busy adapters, idle ones included, until there will be enough for all
        parts. Where there are enough bytes already, close all that lie between them."""
        arena = self._slots.arena
        missing = len(parts) - sum(slot.entry is None for slot in self._slots.slots)
        lacking = 0 if arena is None else sum(rounded(part.slot_nbytes) for part in parts) - arena.free
        scattered = missing <= 0 and lacking <= 0
        while scattered or missing > 0 or lacking > 0:
            busy = self._slots.least_busy(self._closed | keep)
            if busy is None:
                break
            self._closed.add(busy)
            missing -= 1
            lacking -= rounded(self._residency.entries[busy].slot_nbytes)

    def next_retry(self, now: float) -> float | None:
        """Return when a pinned adapter whose copy has failed may be copied again, or a mix has waited long;
        None if there is none."""
        due = [*map(_retry_at, self._pinned_outside()), self.mix_due]
        return min((at for at in due if now < at < inf), default=None)

    def _pinned_outside(self) -> Sequence[AdapterEntry]:
        """Return the pinned adapters that wait for a slot, in the order in which they were read."""
        if not self._residency.pins.count:
            return ()
        return [entry for entry in self._residency.cpu.entries.values() if _waits_for_slot(entry)]

    def apply(self, decision: Resolved, now: float, admitting: set[int]) -> list[Refusal]:
        """Start what can be started of ``place`` and ``prefetch``, in order; ``admitting`` are the uids of
        adapters that the same decision admits requests to. Returns what was refused."""
        refused: list[Refusal] = []
        self.short = None
        if self._border is None and not self._residency.any_wanted and not decision.moves:
            return refused  # as in most steps
        admitting = admitting | self._residency.cpu.reserved
        self._residency.start_wanted(now, admitting, waited=WANT_PATIENCE_SECONDS)
        given = _GivenUp(_members(decision.evict), self._slots, admitting, refused)
        if self._border is not None:
            self._border.offered = given.slots
        for entry, place in decision.place:
            reason = self._place(entry, place, now, admitting, given)
            if reason is not None:
                refused.append((reason, str(place)))
            if reason == "place_no_room":
                self._note_short(entry, now)
        for entry in _members(decision.prefetch):
            if entry.location is Location.DISK:
                self._residency.start_load(entry, now, admitting)
        self._residency.start_wanted(now, admitting)
        refused += self._discard(_members(decision.discard), now, admitting)
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

    def _note_short(self, entry: AdapterEntry, now: float) -> None:
        oldest = entry.oldest_arrival
        if self._border is not None and oldest is not None and now - oldest >= WANT_PATIENCE_SECONDS:
            self.short = oldest if self.short is None else min(oldest, self.short)

    def _place(
        self, entry: AdapterEntry, place: Place, now: float, admitting: set[int], given: _GivenUp
    ) -> str | None:
        holding = self._holding
        ours = holding is None or entry is holding or entry in holding.members
        if not ours and holding is not None and not _is_before(entry.head, holding.head):
            return (
                None  # no fault of the policy's, which cannot know; nor is what else mixes are in the way of
            )
        if isinstance(entry, MixEntry):
            return self._place_mix(entry, place, now, admitting, given)
        if entry.slot is not None:
            return None if entry.mixes else "place_already_placed"
        if entry.location is not Location.CPU:
            if entry.location is Location.DISK:
                self._residency.start_load(entry, now, admitting, self._offered(place, given))
            return None
        slot: Slot | None = None
        if place.slot is not None:
            slot = self._slot_at(place.slot, admitting)
            reason = "place_slot_unknown" if slot is None else _not_takable(slot, admitting)
            if reason is not None:
                return reason

        others = given.others()
        unwanted = (s for s in others if s.entry is not None and not s.entry.is_wanted)
        wanted: Iterable[Slot] = ()
        if place.slot is None:  # or the decision counts on nobody else's slot
            wanted = (s for s in given.others() if s.entry is not None and s.entry.is_wanted)
        return self._start(entry, slot, given.slots(), unwanted, wanted, admitting, now)

    def _slot_at(self, index: int, admitting: set[int]) -> Slot | None:
        """Return the slot that a policy means. For the one as which a mix is shown, it is a part's that can
        be had. None if there is no such slot."""
        slots, shown = self._slots.slots, self._residency.mixes.shown
        if 0 <= index < len(slots):
            return slots[index]
        if not 0 <= index - len(slots) < len(shown):
            return None
        own = [slots[part.slot] for part in shown[index - len(slots)].members if part.slot is not None]
        return min(own, key=lambda slot: _not_takable(slot, admitting) is not None, default=None)

    def _place_mix(
        self, mix: MixEntry, place: Place, now: float, admitting: set[int], given: _GivenUp
    ) -> str | None:
        """Bring the missing parts of a mix into slots, all of them or none. Slots of its other parts stay."""
        missing = mix.missing
        if not missing:
            return None
        own = {member.uid for member in mix.members}
        keep = admitting | own
        for part in missing:
            if part.location is Location.DISK:
                self._residency.start_load(part, now, keep, self._offered(place, given))
        if any(part.location is not Location.CPU for part in missing):
            return None
        groups: list[Iterable[Slot]] = [given.slots()]
        if place.slot is not None:
            slot = self._slot_at(place.slot, admitting)
            reason = "place_slot_unknown" if slot is None else _not_takable(slot, keep)
            if reason is not None or slot is None:
                return reason
            groups.insert(0, [] if slot.entry is None else [slot])
        since = mix.oldest_arrival
        others = [(s, s.entry) for s in given.others() if s.entry is not None]
        groups.append([slot for slot, entry in others if not entry.is_wanted])
        if since is not None:
            later = ((s, e.oldest_arrival) for s, e in others if e.is_wanted)
            groups.append([slot for slot, oldest in later if oldest is not None and oldest > since])
        self._start_all(mix, groups, admitting, now)
        return None

    def _start_all(
        self, mix: MixEntry, groups: Sequence[Iterable[Slot]], stay: set[int], now: float
    ) -> str | None:
        """Begin the copies of all missing parts, into slots that are free, and then into those of ``groups``,
        in order. Adapters in ``stay`` are not even moved. Returns the reason if there are too few; then none
        begins. (Where slots share a memory, a part may still find no hole; it is tried again.)"""
        parts, keep = mix.missing, stay | {member.uid for member in mix.members}
        slots = [s for s in dict.fromkeys(chain.from_iterable(groups)) if s.idle and may_leave(s, keep)]
        arena = self._slots.arena
        if sum(slot.entry is None for slot in self._slots.slots) + len(slots) < len(parts):
            return "place_no_slot"
        if arena is not None and self._border is None:
            leaving = sum(rounded(slot.entry.slot_nbytes) for slot in slots if slot.entry is not None)
            if sum(rounded(part.slot_nbytes) for part in parts) > arena.free + leaving:
                return "place_no_room"
        for part in parts:
            idle = (slot for slot in slots if slot.idle)
            reason = self._start(part, None, (), idle, (), stay, now)
            if reason is not None:
                return reason
        return None

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
        if self._border is not None:
            leaving = [] if slot.entry is None else [slot]
            if not self._border.make_room(entry, leaving, given, others, last, now):
                return "place_no_room"
            self._residency.start_copy(entry, slot, now, after_step=bool(self._border.moves))
            return None
        arena, window = self._slots.arena, None
        if arena is not None:
            leaving = [] if slot.entry is None else [slot]
            by_offset = {s.offset: s for s in self._slots.slots if s.offset is not None}

            def may_move(offset: int) -> bool:
                return by_offset[offset].idle and may_leave(by_offset[offset], keep)

            first: list[Slot] = []
            wanted: list[Slot] = []
            if leaving or not arena.fits(entry.slot_nbytes):
                first = [s for s in dict.fromkeys(victims) if s is not slot]
                wanted = [s for s in last if s is not slot and s not in first]
            room = find_room(arena, entry.slot_nbytes, leaving, first, wanted, may_move)
            if room is None:
                return "place_no_room"
            window = room.move
            for victim in room.evict:
                self._residency.evict_slot(victim, now)
        self._residency.start_copy(entry, slot, now, window)
        return None

    def _offered(self, place: Place, given: _GivenUp) -> Collection[AdapterEntry]:
        """Return the adapters whose slots the policy gives to the newcomer: they may leave the CPU cache,
        too. Otherwise each could wait for the other for ever."""
        if place.slot is None:
            return [entry for entry in given.entries if entry.slot is not None]
        slot = self._slot_at(place.slot, set())
        return () if slot is None or slot.entry is None else (slot.entry,)


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
        return (slot for slot in self._others if slot.idle)

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


def _members(entries: Iterable[AdapterEntry]) -> list[AdapterEntry]:
    """Return the adapters themselves, and the parts of mixes."""
    return [member for entry in entries for member in entry.members]


def _is_before(one: Request | None, other: Request | None) -> bool:
    """Whether the first request came before the other."""
    return one is not None and other is not None and one.seq < other.seq


def _urgent_at(mix: MixEntry) -> float:
    """Return when a mix that requests wait for has waited long."""
    return (mix.oldest_arrival or 0.0) + MIX_PATIENCE_SECONDS


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
