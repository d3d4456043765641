"""Starts moves of adapters into slots and the CPU cache: what the policy asks for, after checks, and what is
pinned."""

from __future__ import annotations

from aioengine.core.adapters.residency import Residency
from aioengine.core.adapters.slots import Slot
from aioengine.core.guard import Resolved
from aioengine.core.state import AdapterEntry
from aioengine.schedulers.policy import Location, Place

WANT_PATIENCE_SECONDS = 1.0
"""Reads that callers asked for by name start after those of the policy's decision, but before them once they
have waited this long. Otherwise a policy that always has something to read would keep them out."""
PIN_RETRY_SECONDS = 1.0
"""Pause before a pinned adapter whose copy into a slot failed is copied again."""

Refusal = tuple[str, str]
"""(reason, item) of an item of a decision that would break an invariant."""


class Placing:
    """Turns decisions into the moves of a ``Residency``."""

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._slots = residency.slots
        self._closed: set[int] = set()

    def is_closed(self, entry: AdapterEntry | None) -> bool:
        """Whether its slot admits no requests because a pinned adapter waits for it."""
        return entry is not None and entry.uid in self._closed

    @property
    def any_closed(self) -> bool:
        return bool(self._closed)

    def place_pinned(self, now: float) -> None:
        """Place pinned adapters as soon as slots are available, whether requests ask for them or not. If no
        slot is idle, one is closed to new requests until it is idle; otherwise steady traffic would keep the
        adapter out for ever."""
        self._closed.clear()
        for entry in self._residency.cpu.entries.values():
            if _waits_for_slot(entry) and now >= _retry_at(entry):
                slot = self._slots.choose(self._slots.superseded())
                if slot is not None:
                    self._residency.start_copy(entry, slot, now)
                elif (busy := self._slots.least_busy(self._closed)) is not None:
                    self._closed.add(busy)

    def next_retry(self, now: float) -> float | None:
        """Time of the next retry of a pinned adapter whose copy failed; None if there is none."""
        due = [_retry_at(entry) for entry in self._residency.cpu.entries.values() if _waits_for_slot(entry)]
        return min((at for at in due if at > now), default=None)

    def apply(self, decision: Resolved, now: float, admitting: set[int]) -> list[Refusal]:
        """Start what can be started of ``place`` and ``prefetch``, in order; ``admitting`` are the uids of
        adapters that the same decision admits requests to. Returns what was refused."""
        self._residency.start_wanted(now, admitting, waited=WANT_PATIENCE_SECONDS)
        refused: list[Refusal] = []
        for entry, place in decision.place:
            reason = self._place(entry, place, now, admitting)
            if reason is not None:
                refused.append((reason, str(place)))
        for entry in decision.prefetch:
            if entry.location is Location.DISK:
                self._residency.start_load(entry, now, admitting)
        self._residency.start_wanted(now, admitting)
        return refused

    def _place(self, entry: AdapterEntry, place: Place, now: float, admitting: set[int]) -> str | None:
        if entry.slot is not None:
            return "place_already_placed"
        if entry.location is not Location.CPU:
            if entry.location is Location.DISK:
                self._residency.start_load(entry, now, admitting, self._offered(place))
            return None
        if place.slot is None:
            slot = self._slots.choose(admitting)
            if slot is None:
                return "place_no_slot"
        else:
            if not 0 <= place.slot < len(self._slots.slots):
                return "place_slot_unknown"
            slot = self._slots.slots[place.slot]
            reason = _not_takable(slot, admitting)
            if reason is not None:
                return reason
        self._residency.start_copy(entry, slot, now)
        return None

    def _offered(self, place: Place) -> AdapterEntry | None:
        """Adapters whose slot the policy gives away. They may also leave the CPU cache for the newcomer;
        otherwise the two could wait for each other for ever."""
        known = place.slot is not None and 0 <= place.slot < len(self._slots.slots)
        return self._slots.slots[place.slot].entry if known and place.slot is not None else None


def _waits_for_slot(entry: AdapterEntry) -> bool:
    return entry.pinned and entry.slot is None and entry.location is Location.CPU


def _retry_at(entry: AdapterEntry) -> float:
    """Time when a pinned adapter may be copied, so that a copy that always fails is not retried without
    pause."""
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
