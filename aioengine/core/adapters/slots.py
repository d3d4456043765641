"""The slot table: which adapter each device slot holds, and the only allowed ways to change that.

    FREE --start_copy--> LOADING --placed--> READY --evict--> FREE
                            \\--cancel--> FREE

A slot is emptied only while no running request uses it, and written only while it is LOADING: so nothing ever
reads a slot that is being written. A READY slot whose adapter has been unloaded or replaced is shown as
DRAINING.

All slots lie in one memory (an :class:`~aioengine.core.adapters.arena.Arena`), of which each slot that is not
free has a region: as many bytes as its adapter needs or, with slots of one size, as many of these.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from aioengine import events
from aioengine.core.adapters.arena import Arena, Window
from aioengine.core.adapters.moves import CopyMove, Move
from aioengine.core.adapters.version import Change, State
from aioengine.core.guard import PolicyGuard
from aioengine.core.limits import CoreLimits
from aioengine.core.record_views import CoreSlotView
from aioengine.core.state import AdapterEntry
from aioengine.schedulers.policy import SlotState

_FREE = SlotState.FREE  # a member of an Enum takes longer to look up than a decision has


@dataclass(slots=True, eq=False)
class Slot:
    index: int
    entry: AdapterEntry | None = None
    offset: int | None = None
    """Offset of its region in the memory, in bytes; None if it is free."""
    last_used: float = 0.0
    moving: bool = False
    """Whether its adapter is being written again at another place."""
    view: CoreSlotView = field(init=False)
    """How policies see it."""

    def __post_init__(self) -> None:
        self.view = CoreSlotView(self)

    @property
    def name(self) -> str | None:
        """The name that policies have for its adapter."""
        return None if self.entry is None else self.entry.name

    @property
    def state(self) -> SlotState:
        return _FREE if self.entry is None else self.entry.slot_state

    @property
    def loading(self) -> bool:
        """Whether it is being written."""
        return self.entry is not None and self.entry.state is State.COPYING

    @property
    def idle(self) -> bool:
        """Whether it holds an adapter that no running request uses."""
        return self.entry is not None and not self.loading and self.entry.running == 0

    @property
    def pinned(self) -> bool:
        return self.entry is not None and self.entry.pinned

    def may_leave(self, keep: Collection[int]) -> bool:
        """Whether its adapter may be evicted or moved, and is not among those (uids) to keep."""
        return self.idle and self.entry is not None and not self.pinned and self.entry.uid not in keep


class SlotTable:
    """``num_slots`` slots in ``slot_memory`` bytes, of which an adapter takes what it needs; without
    ``slot_memory`` every slot has ``slot_bytes``, and an adapter takes as many slots' memory as it needs."""

    def __init__(self, limits: CoreLimits, moves: list[Move], guard: PolicyGuard) -> None:
        self.slots = [Slot(index) for index in range(limits.num_slots)]
        self._by_bytes = limits.slot_memory is not None
        size = max(limits.slot_bytes, 1)
        self.arena = (
            Arena(limits.num_slots * size, size) if limits.slot_memory is None else Arena(limits.slot_memory)
        )
        """The memory of all slots."""
        self.large: set[int] = set()
        """Uids of the adapters that take more than one slot of one size."""
        self._moves = moves
        self._guard = guard
        self._ranks: Sequence[int] | None = None
        """What ``ranks`` returns; None: it is to be made."""

    # Changes

    def start_copy(self, entry: AdapterEntry, slot: Slot, now: float, window: Window | None = None) -> None:
        """Begin a copy into a slot that is free or idle. The slots' memory must have room: now, or once the
        adapters of ``window`` are moved together to its beginning. Each of these is copied again from CPU
        memory, so its old place may be overwritten."""
        first = len(self._moves)
        if slot.entry is not None:
            self.evict(slot, now)
        by_offset = {slot.offset: slot for slot in self.slots}
        moving = [by_offset[at] for at in window.regions] if window is not None else []
        leaving = [(other, self._empty(other, Change.EVICT)) for other in moving]
        at = 0 if window is None else window.begin
        for other, moved in leaving:
            self.arena.allocate_at(at, moved.slot_nbytes)
            self._moves.append(self._begin(other, moved, at))
            self._guard.say(events.AdapterPlacing, moved, now, slot=other.index, moved=True)
            other.moving = True
            at += self.arena.regions[at]
        offset = self.arena.allocate(entry.slot_nbytes)
        assert offset is not None, "room has not been made"
        self._moves.insert(first, self._begin(slot, entry, offset))  # before those that are moved
        self._guard.say(events.AdapterPlacing, entry, now, slot=slot.index)

    def _begin(self, slot: Slot, entry: AdapterEntry, offset: int) -> CopyMove:
        """Begin to write ``entry`` into a free slot, whose region begins at ``offset``."""
        assert slot.entry is None and entry.slot is None
        entry.change(Change.COPY)
        slot.entry, slot.offset, entry.slot, self._ranks = entry, offset, slot.index, None
        return CopyMove(entry, slot.index, offset)

    def _empty(self, slot: Slot, change: Change) -> AdapterEntry:
        """Empty a slot by a change of its adapter, which stays in the CPU cache."""
        entry = slot.entry
        assert entry is not None and slot.offset is not None and entry.running == 0
        entry.change(change)
        self.arena.release(slot.offset)
        slot.entry, slot.offset, slot.moving, entry.slot = None, None, False, None
        self._ranks = None
        return entry

    def placed(self, entry: AdapterEntry, now: float, seconds: float) -> None:
        """Note that a copy is complete."""
        slot = self.slot_of(entry)
        entry.change(Change.PLACE)
        entry.error, entry.slot_seconds = None, seconds
        moved, slot.moving, self._ranks = slot.moving, False, None
        if not moved:
            slot.last_used = entry.last_used = now
        self._guard.say(
            events.AdapterPlaced,
            entry,
            now,
            slot=slot.index,
            rank=entry.rank,
            nbytes=entry.nbytes,
            seconds=seconds,
            moved=moved,
        )
        if not moved:
            self._guard.tell("adapter_placed", now, adapter=entry.name)

    def cancel(self, entry: AdapterEntry, now: float) -> None:
        """Note that a copy has failed, or is given up."""
        slot = self.slot_of(entry)
        moved = slot.moving
        self._empty(slot, Change.CANCEL)
        if moved:  # policy and listeners know it as an adapter in a slot
            self._say_evicted(entry, slot, now)

    def evict(self, slot: Slot, now: float) -> None:
        """Empty an idle slot; its adapter stays in the CPU cache."""
        entry = self._empty(slot, Change.EVICT)
        entry.last_used = max(entry.last_used, slot.last_used)
        self._say_evicted(entry, slot, now)

    def _say_evicted(self, entry: AdapterEntry, slot: Slot, now: float) -> None:
        self._guard.say(events.AdapterEvicted, entry, now, level="slot", slot=slot.index, nbytes=entry.nbytes)
        self._guard.tell("adapter_evicted", now, adapter=entry.name)

    def slot_of(self, entry: AdapterEntry) -> Slot:
        """Return the slot that holds an adapter, or is being written with it."""
        assert entry.slot is not None
        return self.slots[entry.slot]

    # Questions

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
        held = [slot.offset for slot in self.slots if slot.pinned and slot.offset is not None]
        if len(self.slots) == len(held):
            return 0
        beside = self.arena.copy()
        beside.regions = {offset: self.arena.regions[offset] for offset in held}
        return beside.largest_hole

    def superseded(self) -> set[int]:
        """Return the uids of old versions in slots that accepted requests still wait for."""
        held = [slot.entry for slot in self.slots if slot.entry is not None]
        return {entry.uid for entry in held if entry.retired and entry.waiting}

    def least_busy(self, besides: set[int]) -> AdapterEntry | None:
        """Return the adapter with the fewest running requests whose slot a pinned one could have."""
        keep = besides | self.superseded()
        held = [slot.entry for slot in self.slots if slot.entry is not None and not slot.loading]
        could = [entry for entry in held if not entry.pinned and entry.uid not in keep]
        return min(could, key=lambda entry: entry.running, default=None)

    def ranks(self) -> Sequence[int]:
        """Return the rank in each usable slot, 0 elsewhere."""
        if self._ranks is None:
            self._ranks = [0 if s.entry is None or s.loading else s.entry.rank for s in self.slots]
        return self._ranks

    def victims(self, keep: Collection[int]) -> list[Slot]:
        """Return the idle slots that are not pinned and whose adapter (by uid) is not in ``keep``. Those that
        no request waits for come first; among equals, the least recently used."""
        return sorted(
            (slot for slot in self.slots if slot.may_leave(keep)),
            key=lambda slot: (slot.entry is not None and len(slot.entry.waiting) > 0, slot.last_used),
        )

    def check(self) -> None:
        known, self._ranks = self._ranks, None
        assert known is None or known == self.ranks()
        self.arena.check()
        taken: dict[int | None, int] = {}
        for slot in self.slots:
            entry = slot.entry
            if entry is None:
                assert slot.offset is None and not slot.moving
                continue
            assert entry.slot == slot.index and entry.state in (State.COPYING, State.IN_SLOT)
            assert not slot.loading or not entry.running, "a slot is written while in use"
            assert slot.loading or not slot.moving
            taken[slot.offset] = self.arena.rounded(entry.slot_nbytes)
        assert taken == self.arena.regions, "the memory's regions are not those of the residents"
