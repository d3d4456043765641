"""The slot table: which adapter each device slot holds, and the only allowed ways to change that.

    FREE --begin--> LOADING --activate--> READY --release--> FREE
                       \\--cancel--> FREE

A slot is released only while no running request uses it, and written only between ``begin`` and
``activate``: so nothing ever reads a slot that is being written. A READY slot whose adapter has been
unloaded or replaced is shown as DRAINING.

All slots lie in one memory (an :class:`~aioengine.core.adapters.arena.Arena`), of which each slot that is not
free has a region: as many bytes as its adapter needs or, with slots of one size, as many of these.
"""

from __future__ import annotations

from collections.abc import Sequence

from aioengine.core.adapters.arena import Arena
from aioengine.core.adapters.version import Change, State
from aioengine.core.state import AdapterEntry
from aioengine.schedulers.policy import SlotState


class Slot:
    __slots__ = ("entry", "index", "last_used", "moving", "name", "offset", "state")

    def __init__(self, index: int) -> None:
        self.index = index
        self.entry: AdapterEntry | None = None
        self.name: str | None = None
        """Name that the policy has for it."""
        self.moving = False
        """Whether its adapter is being written again at another place."""
        self.offset: int | None = None
        """Offset of its region in the memory, in bytes; None if it is free."""
        self.last_used = 0.0
        self.state = SlotState.FREE

    @property
    def loading(self) -> bool:
        """Whether it is being written."""
        return self.entry is not None and self.entry.state is State.COPYING

    @property
    def idle(self) -> bool:
        """Whether it holds an adapter that no running request uses."""
        return self.entry is not None and not self.loading and self.entry.running == 0


class SlotTable:
    """``num_slots`` slots in ``memory`` bytes, of which an adapter takes what it needs; ``memory`` None:
    every slot has ``slot_bytes``, and an adapter takes as many slots' memory as it needs."""

    def __init__(self, num_slots: int, slot_bytes: int, memory: int | None = None) -> None:
        self.slots = [Slot(index) for index in range(num_slots)]
        self._by_bytes = memory is not None
        size = max(slot_bytes, 1)
        self.arena = Arena(num_slots * size, size) if memory is None else Arena(memory)
        """The memory of all slots."""
        self.large: set[int] = set()
        """Uids of the adapters that take more than one slot of one size."""
        self._ranks: Sequence[int] | None = None
        """What ``ranks`` returns; None: it is to be made."""

    def begin(self, slot: Slot, entry: AdapterEntry, offset: int | None = None) -> int:
        """Begin to write ``entry`` into ``slot``, and return its offset. ``offset``: of the hole to use;
        None: the best one."""
        assert slot.entry is None and entry.slot is None
        entry.change(Change.COPY)
        if offset is None:
            offset = self.arena.allocate(entry.slot_nbytes)
            assert offset is not None, "room has not been made"
        else:
            self.arena.allocate_at(offset, entry.slot_nbytes)
        slot.offset = offset
        slot.entry, slot.name = entry, entry.name
        slot.state = SlotState.LOADING
        entry.slot = slot.index
        self._ranks = None
        return offset

    def activate(self, slot: Slot, now: float) -> None:
        assert slot.entry is not None
        slot.entry.change(Change.PLACE)
        slot.moving = False
        slot.last_used = now
        slot.state = SlotState.DRAINING if slot.entry.retired else SlotState.READY
        self._ranks = None

    def retired(self, entry: AdapterEntry) -> None:
        """Note that an adapter accepts no new requests, and has another name now."""
        if entry.slot is not None:
            slot = self.slots[entry.slot]
            slot.name = entry.name
            if not slot.loading:
                slot.state = SlotState.DRAINING

    def cancel(self, slot: Slot) -> None:
        assert slot.entry is not None
        slot.entry.change(Change.CANCEL)
        slot.entry.slot = None
        slot.entry = None
        slot.moving = False
        self._give_back(slot)

    def release(self, slot: Slot) -> AdapterEntry:
        """Empty an idle slot; its adapter stays in the CPU cache."""
        assert slot.idle and slot.entry is not None
        entry = slot.entry
        entry.change(Change.EVICT)
        entry.slot = None
        slot.entry = None
        self._give_back(slot)
        return entry

    def _give_back(self, slot: Slot) -> None:
        slot.state, slot.name = SlotState.FREE, None
        self._ranks = None
        assert slot.offset is not None
        self.arena.release(slot.offset)
        slot.offset = None

    @property
    def elastic(self) -> bool:
        """Whether adapters differ in how much of the memory they take."""
        return self._by_bytes or bool(self.large)

    def places_of(self, nbytes: int) -> int:
        """Return how many slots of one size an adapter takes; 1 where slots have no size."""
        return 1 if self._by_bytes else self.arena.rounded(nbytes) // self.arena.granule

    def room_beside_pinned(self) -> int:
        """Return the bytes of the largest adapter that may still get a slot while pinned adapters stay; 0 if
        these hold every slot. Pinned adapters are not moved."""
        held = [slot for slot in self.slots if slot.entry is not None and slot.entry.pinned]
        if len(self.slots) == len(held):
            return 0
        largest = begin = 0
        for offset in sorted(slot.offset for slot in held if slot.offset is not None):
            largest = max(largest, offset - begin)
            begin = offset + self.arena.regions[offset]
        return max(largest, self.arena.size - begin)

    def superseded(self) -> set[int]:
        """Return the uids of old versions in slots that accepted requests still wait for."""
        held = [s.entry for s in self.slots if s.entry is not None]
        return {entry.uid for entry in held if entry.retired and entry.waiting}

    def least_busy(self, besides: set[int]) -> int | None:
        """Return the uid of the adapter with the fewest running requests whose slot a pinned one could
        have."""
        keep = besides | self.superseded()
        held = [s.entry for s in self.slots if s.entry is not None and not s.loading]
        could = [entry for entry in held if not entry.pinned and entry.uid not in keep]
        return min(could, key=lambda entry: entry.running).uid if could else None

    def ranks(self) -> Sequence[int]:
        """Return the rank in each usable slot, 0 elsewhere."""
        if self._ranks is None:
            self._ranks = [0 if s.entry is None or s.loading else s.entry.rank for s in self.slots]
        return self._ranks

    @property
    def free_slot(self) -> Slot | None:
        return next((s for s in self.slots if s.entry is None), None)

    def victims(self, keep: set[int]) -> list[Slot]:
        """Return the idle slots that are not pinned and whose adapter (by uid) is not in ``keep``. Those that
        no request waits for come first; among equals, the least recently used."""
        return sorted(
            (s for s in self.slots if s.idle and may_leave(s, keep)),
            key=lambda s: (s.entry is not None and len(s.entry.waiting) > 0, s.last_used),
        )

    def check(self) -> None:
        known, self._ranks = self._ranks, None
        assert known is None or known == self.ranks()
        held = [s.entry.uid for s in self.slots if s.entry is not None]
        assert len(held) == len(set(held)), "an adapter is in two slots"
        for slot in self.slots:
            assert (slot.state is SlotState.FREE) == (slot.entry is None)
            assert slot.name == (None if slot.entry is None else slot.entry.name)
            assert (slot.state is SlotState.LOADING) == slot.loading
            if slot.entry is not None:
                retired = slot.entry.retired and not slot.loading
                assert (slot.state is SlotState.DRAINING) == retired
                assert slot.entry.slot == slot.index
                assert slot.entry.state in (State.COPYING, State.IN_SLOT)
                assert not (slot.loading and slot.entry.running), "a slot is written while in use"
            assert (slot.offset is None) == (slot.entry is None)
            assert slot.loading or not slot.moving
        self.arena.check()
        taken = {s.offset: self.arena.rounded(s.entry.slot_nbytes) for s in self.slots if s.entry is not None}
        assert taken == self.arena.regions, "the memory's regions are not those of the residents"


def may_leave(slot: Slot, keep: set[int]) -> bool:
    """Whether an idle slot may be emptied, or its adapter moved."""
    return slot.entry is not None and not slot.entry.pinned and slot.entry.uid not in keep
