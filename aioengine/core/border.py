"""The border in a memory that adapters and KV blocks share: adapters lie below it, blocks above.

The memory is ``num_blocks`` KV blocks of ``block_bytes``. The blocks that are lent to adapters, from the
first on, are the adapters' arena. Lending the next blocks moves the border up: their contents, cached or
live, move to other blocks, and the sequences' block tables are updated. Taking blocks back moves the border
down: for that, adapters are moved together. Both are decided between steps, and the data moves before the
next step reads anything (``moves``). An adapter is copied to a place that such a move frees only after that
step.

What gives way, in this order:

- to an adapter: free blocks without contents; adapters that the policy's decision gives up
  (``Decision.evict``); cached prefixes, if requests wait for the adapter or it is pinned; other idle
  adapters, those that no request waits for first;
- to a sequence: the same adapters before cached prefixes; then those; and where a sequence would otherwise be
  preempted, or nothing runs, any idle adapter.

One request of the largest length always has room beside the adapters, so that something can always run.

The idea of one memory for both is from S-LoRA's unified paging (Sheng et al., 2023, arXiv:2311.03285). There
adapters are scattered over pages, which its kernels gather. Here each adapter stays in one piece, and is
moved instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from aioengine import events
from aioengine.core.adapters.arena import Arena, packing, rounded
from aioengine.core.adapters.residency import Residency
from aioengine.core.adapters.slots import Slot
from aioengine.core.blocks import BlockManager
from aioengine.core.state import AdapterEntry, Request
from aioengine.step import MemoryMove


class _Way(NamedTuple):
    """A way to make room."""

    evict: list[Slot]
    pack: bool
    """Whether adapters are moved together."""
    lend: int
    """Number of blocks to lend."""


class Border:
    """Moves the border of a ``Residency`` and a ``BlockManager``.

    ``least`` is how many blocks are never lent. ``running`` are the requests that hold blocks.
    """

    def __init__(
        self,
        residency: Residency,
        blocks: BlockManager,
        running: Mapping[int, Request],
        block_bytes: int,
        least: int,
        emit: Callable[[events.Event], None],
    ) -> None:
        arena = residency.slots.arena
        assert arena is not None and block_bytes == rounded(block_bytes)
        self.arena: Arena = arena
        self.block_bytes = block_bytes
        self._residency = residency
        self._slots = residency.slots
        self._blocks = blocks
        self._running = running
        self._least = least
        self._emit = emit
        self.moves: list[MemoryMove] = []
        """Moves that the next step carries out first."""
        self._taken: set[int] = set()
        """Uids of adapters that have left for sequences since the last step was formed."""
        self.offered: Callable[[], Iterator[Slot]] = lambda: iter(())
        """The slots that the policy's last decision gives up, in its order."""

    def has_taken(self, entry: AdapterEntry) -> bool:
        """Whether the adapter had to leave for a sequence in this step, which the policy could not know."""
        return any(member.uid in self._taken for member in entry.members)

    def take_moves(self) -> list[MemoryMove]:
        moves, self.moves = self.moves, []
        self._taken.clear()
        return moves

    @property
    def is_in_use(self) -> bool:
        """Whether sequences hold blocks, which become free when these end."""
        return bool(self._running)

    def forget(self) -> None:
        """Note that all contents are lost."""
        self.moves = []

    def spare(self, *, cached: bool) -> int:
        """Return how many blocks can be lent without a preemption soon. ``cached``: also those with
        contents."""
        blocks = self._blocks
        free = blocks.num_free if cached else blocks.num_free - blocks.num_cached
        return max(0, min(free, blocks.num_free - len(self._running), blocks.size - self._least))

    # For an adapter

    def make_room(
        self,
        entry: AdapterEntry,
        leaving: list[Slot],
        given: Iterable[Slot],
        others: Iterable[Slot],
        last: Iterable[Slot],
        now: float,
    ) -> bool:
        """Make a hole for an adapter, once ``leaving`` are gone; returns whether there is one. Nothing is
        changed if not.

        Args:
            given, others, last: Slots whose adapters may leave, before cached prefixes and after them.
        """
        cached = entry.is_wanted or entry.pinned
        return self._make(rounded(entry.slot_nbytes), leaving, (given, others, last), now, cached=cached)

    def make_hole(self, nbytes: int, slots: Iterable[Slot], now: float) -> bool:
        """Make a hole of this size for the parts of a mix, which requests wait for. ``slots``: those whose
        adapters may leave. Returns whether there is one. Nothing is changed if not."""
        return self._make(nbytes, [], ((), slots), now, cached=True)

    def _make(
        self,
        size: int,
        leaving: list[Slot],
        groups: tuple[Iterable[Slot], ...],
        now: float,
        *,
        cached: bool,
    ) -> bool:
        way = self._way(size, leaving, groups, cached=cached)
        if way is None:
            return False
        for slot in (*leaving, *way.evict):
            self._residency.evict_slot(slot, now)
        if way.pack:
            self._pack(now)
        if way.lend:
            self._lend(way.lend, now)
        return True

    def _way(
        self, size: int, leaving: list[Slot], groups: tuple[Iterable[Slot], ...], *, cached: bool
    ) -> _Way | None:
        arena = self.arena.copy()
        for slot in leaving:
            assert slot.offset is not None
            arena.release(slot.offset)
        evict: list[Slot] = []
        for group, victims in enumerate(groups):
            spare = self.spare(cached=cached and group > 0)
            in_order = iter(victims)
            while True:
                way = self._fits(arena, size, spare)
                if way is not None:
                    return _Way(evict, *way)
                victim = next(in_order, None)
                if victim is None:
                    break
                if victim in evict or victim in leaving:
                    continue
                assert victim.offset is not None
                arena.release(victim.offset)
                evict.append(victim)
        return None

    def _fits(self, arena: Arena, size: int, spare: int) -> tuple[bool, int] | None:
        """Return whether to move adapters together, and how many blocks to lend, for a hole; None if there is
        no way."""
        if arena.fits(size):
            return False, 0
        if arena.free + spare * self.block_bytes < size:
            return None
        lend = self._missing(arena.size - arena.end, size)
        if lend <= spare:
            return False, lend
        lend = self._missing(arena.size - packing(arena.regions, self._may_move()).end, size)
        return (True, lend) if lend <= spare else None

    def _missing(self, have: int, size: int) -> int:
        """Return the number of blocks that make up for the missing bytes."""
        return max(0, -(-(size - have) // self.block_bytes))

    # For sequences

    def before_allocation(self, count: int, now: float, keep: AdapterEntry | None) -> None:
        """Make room for ``count`` blocks that are about to be allocated: adapters that the policy's decision
        gives up leave before a cached prefix does. ``keep`` stays."""
        blocks = self._blocks
        missing = min(count - (blocks.num_free - blocks.num_cached), blocks.lent)
        if missing > 0:
            stay = () if keep is None else keep.members
            offered = (slot for slot in self.offered() if slot.entry not in stay)
            self._take_back(missing, offered, now, partly=True)

    def make_blocks(self, count: int, now: float, keep: AdapterEntry | None, *, urgent: bool) -> bool:
        """Take back blocks until ``count`` are free. Returns whether that was possible. ``keep`` stays.
        ``urgent``: adapters that requests wait for may leave, too."""
        count -= self._blocks.num_free
        if count > self._blocks.lent:
            return False
        victims = (
            slot
            for slot in self._slots.victims(set() if keep is None else {m.uid for m in keep.members})
            if urgent or (slot.entry is not None and not slot.entry.is_wanted)
        )
        return self._take_back(count, victims, now)

    def _take_back(self, count: int, victims: Iterator[Slot], now: float, *, partly: bool = False) -> bool:
        arena = self.arena.copy()
        evict: list[Slot] = []
        may_move = self._may_move()
        while True:
            pack = arena.end > self._target(count)
            if not pack or packing(arena.regions, may_move).end <= self._target(count):
                break
            victim = next(victims, None)
            if victim is None:
                if not partly or not evict:
                    return False
                break
            if victim.offset in arena.regions and victim not in evict:
                arena.release(victim.offset)
                evict.append(victim)
        for slot in evict:
            if slot.entry is not None:
                self._taken.add(slot.entry.uid)
            self._residency.evict_slot(slot, now)
        if pack:
            self._pack(now)
        count = (self.arena.size - self.arena.end) // self.block_bytes
        self.arena.resize(self.arena.size - count * self.block_bytes)
        self._blocks.take_back(count)
        return True

    def _target(self, count: int) -> int:
        """Return where the last adapter has to end so that ``count`` blocks can be taken back."""
        return self.arena.size - count * self.block_bytes

    # What moves

    def _may_move(self) -> Callable[[int], bool]:
        """Return a function that says whether an adapter may be moved before the next step. It may even if
        requests run on it, but not while it is being copied."""
        copied = {slot.offset for slot in self._slots.slots if slot.loading}
        return lambda offset: offset not in copied

    def _pack(self, now: float) -> None:
        by_offset = {slot.offset: slot for slot in self._slots.slots}
        for offset, to in packing(self.arena.regions, self._may_move()).moves:
            slot, size = by_offset[offset], self.arena.regions[offset]
            assert slot.entry is not None
            self.arena.release(offset)
            self.arena.allocate_at(to, size)
            slot.offset = to
            self.moves.append(MemoryMove(to, offset, size, slot.index))
            self._emit(
                events.AdapterShifted(
                    time=now,
                    adapter=slot.entry.label,
                    version=slot.entry.version,
                    slot=slot.index,
                    nbytes=size,
                )
            )

    def _lend(self, count: int, now: float) -> None:
        moved = dict(self._blocks.lend(count))
        self.arena.resize(self.arena.size + count * self.block_bytes)
        if not moved:
            return
        for request in self._running.values():
            if not moved.keys().isdisjoint(request.blocks):
                request.blocks = [moved.get(block, block) for block in request.blocks]
        size = self.block_bytes
        self.moves += [MemoryMove(to * size, block * size, size) for block, to in moved.items()]
        self._emit(events.BlocksMoved(time=now, blocks=len(moved), nbytes=len(moved) * size))

    def check(self) -> None:
        """Assert that both sides agree on where the border is."""
        assert self.arena.size == self._blocks.lent * self.block_bytes <= self.arena.limit
        assert self._blocks.size >= self._least
