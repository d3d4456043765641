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
from operator import attrgetter

from aioengine import events
from aioengine.core.adapters.arena import Arena
from aioengine.core.adapters.moves import CopyMove, Move
from aioengine.core.adapters.version import Change, State
from aioengine.core.guard import PolicyGuard
from aioengine.core.limits import CoreLimits
from aioengine.core.state import AdapterEntry, RecordView
from aioengine.schedulers.policy import SlotState


class _Nothing:
    """What an empty slot shows."""

    name = None
    slot_state = SlotState.FREE
    running = 0
    pinned = False


_NOTHING = _Nothing()


class CoreSlotView(RecordView):
    """The :class:`~aioengine.schedulers.policy.SlotView` of a slot."""

    __slots__ = ()

    index = property(attrgetter("_of.index"))
    adapter = property(attrgetter("_of.shown.name"))
    state = property(attrgetter("_of.shown.slot_state"))
    last_used = property(attrgetter("_of.last_used"))
    running = property(attrgetter("_of.shown.running"))
    pinned = property(attrgetter("_of.shown.pinned"))


@dataclass(slots=True, eq=False)
class Slot:
    index: int
    entry: AdapterEntry | None = None
    shown: AdapterEntry | _Nothing = _NOTHING
    """What policies see of it. They look very often."""
    offset: int | None = None
    """Offset of its region in the memory, in bytes; None if it is free."""
    last_used: float = 0.0
    view: CoreSlotView = field(init=False)
    """How policies see it."""

    def __post_init__(self) -> None:
        self.view = CoreSlotView(self)

    @property
    def state(self) -> SlotState:
        return self.shown.slot_state

    def why_not(self, keep: Collection[int]) -> str | None:
        """Return the reason why its adapter may not leave now; adapters (by uid) in ``keep`` may not."""
        entry = self.entry
        if entry is None:
            return None
        if entry.state is State.COPYING:
            return "loading"
        if entry.running:
            return "busy"
        if entry.pinned:
            return "pinned"
        return "admitted" if entry.uid in keep else None


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

    def start_copy(self, entry: AdapterEntry, slot: Slot, now: float) -> None:
        """Begin a copy into a free slot. The slots' memory must have room."""
        assert slot.entry is None and entry.slot is None
        offset = self.arena.allocate(entry.slot_nbytes)
        assert offset is not None, "room has not been made"
        entry.change("copy")
        slot.entry = slot.shown = entry
        slot.offset, entry.slot, self._ranks = offset, slot.index, None
        self._moves.append(CopyMove(entry, slot.index, offset))
        self._guard.say(events.AdapterPlacing, entry, now, slot=slot.index)

    def placed(self, entry: AdapterEntry, now: float, seconds: float) -> None:
        """Note that a copy is complete."""
        slot = self.slot_of(entry)
        entry.change("place")
        entry.error, entry.slot_seconds, self._ranks = None, seconds, None
        slot.last_used = entry.last_used = now
        took = {"rank": entry.rank, "nbytes": entry.nbytes, "seconds": seconds}
        self._guard.say(events.AdapterPlaced, entry, now, slot=slot.index, **took)
        self._guard.tell("adapter_placed", now, adapter=entry.name)

    def cancel(self, entry: AdapterEntry) -> None:
        """Note that a copy has failed, or is given up."""
        self._empty(self.slot_of(entry), "cancel")

    def evict(self, slot: Slot, now: float) -> None:
        """Empty an idle slot; its adapter stays in the CPU cache."""
        entry = self._empty(slot, "evict")
        entry.last_used = max(entry.last_used, slot.last_used)
        self._guard.say(events.AdapterEvicted, entry, now, level="slot", slot=slot.index, nbytes=entry.nbytes)
        self._guard.tell("adapter_evicted", now, adapter=entry.name)

    def _empty(self, slot: Slot, change: Change) -> AdapterEntry:
        """Empty a slot by a change of its adapter, which stays in the CPU cache."""
        entry = slot.entry
        assert entry is not None and slot.offset is not None and entry.running == 0
        entry.change(change)
        self.arena.release(slot.offset)
        slot.entry = slot.offset = entry.slot = self._ranks = None
        slot.shown = _NOTHING
        return entry

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
        these hold every slot."""
        held = [slot.offset for slot in self.slots if slot.shown.pinned]
        return 0 if len(self.slots) == len(held) else self.arena.of(held).largest_hole

    def ranks(self) -> Sequence[int]:
        """Return the rank in each usable slot, 0 elsewhere."""
        if self._ranks is None:
            entries = [slot.entry for slot in self.slots]
            self._ranks = [e.rank if e is not None and e.state is State.IN_SLOT else 0 for e in entries]
        return self._ranks

    def victims(self, keep: Collection[int]) -> list[Slot]:
        """Return the idle slots that are not pinned and whose adapter (by uid) is not in ``keep``. Those that
        no request waits for come first; among equals, the least recently used."""
        idle = [(s.entry, s) for s in self.slots if s.entry is not None and s.why_not(keep) is None]
        idle.sort(key=lambda one: (len(one[0].waiting) > 0, one[1].last_used))
        return [slot for _, slot in idle]

    def check(self) -> None:
        known, self._ranks = self._ranks, None
        assert known is None or known == self.ranks()
        self.arena.check()
        taken: dict[int | None, int] = {}
        for slot in self.slots:
            entry = slot.entry
            if entry is None:
                assert slot.offset is None
                continue
            assert entry.slot == slot.index and entry.state in (State.COPYING, State.IN_SLOT)
            assert entry.state is State.IN_SLOT or not entry.running, "a slot is written while in use"
            taken[slot.offset] = self.arena.rounded(entry.slot_nbytes)
        assert taken == self.arena.regions, "the memory's regions are not those of the residents"
