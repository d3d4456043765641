"""The slot table: which adapter each device slot holds, and the only legal ways to change that.

    FREE --begin--> LOADING --activate--> READY --release--> FREE
                       \\--cancel--> FREE

A slot is released only while no running request uses it, and written only between ``begin`` and
``activate``: so nothing ever reads a slot that is being written. DRAINING is READY seen from outside
when the adapter has been unloaded or replaced.
"""

from __future__ import annotations

from aioengine.core.state import AdapterEntry
from aioengine.schedulers.policy import Location, SlotState


class Slot:
    __slots__ = ("entry", "index", "last_used", "loading")

    def __init__(self, index: int) -> None:
        self.index = index
        self.entry: AdapterEntry | None = None
        self.loading = False
        self.last_used = 0.0

    @property
    def state(self) -> SlotState:
        if self.entry is None:
            return SlotState.FREE
        if self.loading:
            return SlotState.LOADING
        return SlotState.DRAINING if self.entry.retired else SlotState.READY

    @property
    def idle(self) -> bool:
        """Whether it holds an adapter that no running request uses."""
        return self.entry is not None and not self.loading and self.entry.running == 0


class SlotTable:
    def __init__(self, num_slots: int) -> None:
        self.slots = [Slot(index) for index in range(num_slots)]

    def begin(self, slot: Slot, entry: AdapterEntry) -> None:
        assert slot.entry is None and entry.slot is None and entry.location is Location.CPU
        slot.entry = entry
        slot.loading = True
        entry.slot = slot.index

    def activate(self, slot: Slot, now: float) -> None:
        assert slot.loading and slot.entry is not None
        slot.loading = False
        slot.last_used = now
        slot.entry.location = Location.SLOT

    def cancel(self, slot: Slot) -> None:
        assert slot.loading and slot.entry is not None
        slot.entry.slot = None
        slot.entry = None
        slot.loading = False

    def release(self, slot: Slot) -> AdapterEntry:
        """Empty an idle slot; its adapter stays in the CPU cache."""
        assert slot.idle and slot.entry is not None
        entry = slot.entry
        entry.slot = None
        entry.location = Location.CPU
        slot.entry = None
        return entry

    @property
    def all_pinned(self) -> bool:
        """Whether every slot holds, or is receiving, a pinned adapter."""
        held = [s.entry for s in self.slots if s.entry is not None and s.entry.pinned]
        return 0 < len(self.slots) == len(held)

    def superseded(self) -> set[int]:
        """Uids of old versions in slots that accepted requests still wait for."""
        held = [s.entry for s in self.slots if s.entry is not None]
        return {entry.uid for entry in held if entry.retired and entry.waiting}

    def least_busy(self, besides: set[int]) -> int | None:
        """The uid of the adapter with the fewest running requests whose slot a pinned one could have."""
        keep = besides | self.superseded()
        held = [s.entry for s in self.slots if s.entry is not None and not s.loading]
        could = [entry for entry in held if not entry.pinned and entry.uid not in keep]
        return min(could, key=lambda entry: entry.running).uid if could else None

    def ranks(self) -> list[int]:
        """The rank in each usable slot, 0 elsewhere."""
        return [0 if s.entry is None or s.loading else s.entry.rank for s in self.slots]

    def choose(self, keep: set[int]) -> Slot | None:
        """A free slot, else the least recently used idle one that is not pinned and whose adapter (by
        uid) is not in ``keep``; those that nobody waits for first."""
        free = next((s for s in self.slots if s.entry is None), None)
        if free is not None:
            return free
        idle = [
            s
            for s in self.slots
            if s.idle and s.entry is not None and not s.entry.pinned and s.entry.uid not in keep
        ]
        return min(
            idle,
            key=lambda s: (s.entry is not None and len(s.entry.waiting) > 0, s.last_used),
            default=None,
        )

    def check(self) -> None:
        held = [s.entry.uid for s in self.slots if s.entry is not None]
        assert len(held) == len(set(held)), "an adapter is in two slots"
        for slot in self.slots:
            if slot.entry is not None:
                assert slot.entry.slot == slot.index
                assert slot.entry.location is (Location.CPU if slot.loading else Location.SLOT)
                assert not (slot.loading and slot.entry.running), "a slot is written while in use"
