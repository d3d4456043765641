"""Accounting of one memory that holds adapters: which adapter has which bytes, and where the holes are.

Best fit with immediate coalescing: a hole never adjoins another one. So the waste is bounded:

- inside: each region is rounded up to whole granules, so less than one is lost to each adapter;
- between: an allocation of n bytes fails only if every hole is smaller than n. There is at most one hole more
than there are regions, so with k regions less than (k + 1) * n bytes are free then.

Moving idle adapters together makes the bytes between regions usable again: see :func:`compaction`.
Knuth, The Art of Computer Programming, volume 1, 2.5 (best fit, boundary tags).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from typing import NamedTuple

from aioengine.step import SLOT_GRANULE

GRANULE = SLOT_GRANULE
"""Bytes of the smallest granule."""
TRIES = 3
"""Maximum number of searches for a window between evictions; each search visits all regions."""


class Arena:
    """Regions in ``size`` bytes, rounded down to whole granules. Offsets and sizes are in bytes.

    ``granule``: what the size of each region is rounded up to, and where it may begin. With granules as large
    as a slot for any adapter, all regions are slots of one size.
    """

    def __init__(self, size: int, granule: int = GRANULE) -> None:
        self.granule = granule
        self.size = size // granule * granule
        self.regions: dict[int, int] = {}
        """Size of each region, by offset."""
        self.used = 0
        self._holes: list[tuple[int, int]] = []
        """(size, offset), sorted."""
        self._size_at: dict[int, int] = {}
        """Size of each hole, by offset."""
        self._begin_of: dict[int, int] = {}
        """Offset of each hole, by its end."""
        if self.size:
            self._add_hole(0, self.size)

    @property
    def free(self) -> int:
        return self.size - self.used

    @property
    def largest_hole(self) -> int:
        return self._holes[-1][0] if self._holes else 0

    def rounded(self, nbytes: int) -> int:
        """Return the bytes that a region for ``nbytes`` takes."""
        return -(-max(nbytes, 1) // self.granule) * self.granule

    def copy(self) -> Arena:
        """Return a copy, for a trial."""
        other = Arena(0, self.granule)
        other.size, other.used, other.regions = self.size, self.used, dict(self.regions)
        other._holes, other._size_at = list(self._holes), dict(self._size_at)
        other._begin_of = dict(self._begin_of)
        return other

    def fits(self, nbytes: int) -> bool:
        return self.rounded(nbytes) <= self.largest_hole

    def allocate(self, nbytes: int) -> int | None:
        """Take a region for ``nbytes`` in the smallest hole with room. Returns its offset; None if there is
        no hole."""
        size = self.rounded(nbytes)
        index = bisect_left(self._holes, (size, -1))
        if index == len(self._holes):
            return None
        offset = self._holes[index][1]
        self._take(offset, offset, size)
        return offset

    def allocate_at(self, offset: int, nbytes: int) -> None:
        """Take a region at ``offset``, where a hole with enough room must begin."""
        self._take(offset, offset, self.rounded(nbytes))

    def release(self, offset: int) -> None:
        """Give a region back. Raises KeyError if no region begins at ``offset``."""
        size = self.regions.pop(offset)
        self.used -= size
        begin, end = offset, offset + size
        if begin in self._begin_of:
            begin = self._begin_of[begin]
            self._remove_hole(begin)
        if end in self._size_at:
            end += self._size_at[end]
            self._remove_hole(offset + size)
        self._add_hole(begin, end - begin)

    def _take(self, hole: int, offset: int, size: int) -> None:
        room = self._size_at[hole]
        assert size <= room
        self._remove_hole(hole)
        self.regions[offset] = size
        self.used += size
        if size < room:
            self._add_hole(offset + size, room - size)

    def _add_hole(self, offset: int, size: int) -> None:
        insort(self._holes, (size, offset))
        self._size_at[offset] = size
        self._begin_of[offset + size] = offset

    def _remove_hole(self, offset: int) -> None:
        size = self._size_at.pop(offset)
        del self._begin_of[offset + size]
        del self._holes[bisect_left(self._holes, (size, offset))]

    def check(self) -> None:
        """Assert that regions and holes cover the memory once, and that no two holes adjoin."""
        at, was_hole = 0, False
        parts = [(offset, size, False) for offset, size in self.regions.items()]
        parts += [(offset, size, True) for size, offset in self._holes]
        for offset, size, is_hole in sorted(parts):
            assert offset == at and size > 0 and size % self.granule == 0
            assert not (is_hole and was_hole), "two holes adjoin"
            at, was_hole = at + size, is_hole
        assert at == self.size
        assert self.used == sum(self.regions.values())
        assert self._size_at == {offset: size for size, offset in self._holes}
        assert self._begin_of == {offset + size: offset for size, offset in self._holes}
        assert self._holes == sorted(self._holes)


class Window(NamedTuple):
    """A stretch of the memory in which all regions are moved to its beginning, so that one hole remains."""

    begin: int
    regions: Sequence[int]
    """Offsets of the regions to move, in order."""
    moved: int
    """Bytes of these regions."""


def compaction(arena: Arena, nbytes: int, may_move: Callable[[int], bool]) -> Window | None:
    """Find the window whose holes together have room for ``nbytes``, and in which the fewest bytes must be
    moved.

    ``may_move`` takes a region's offset and says whether the region may be moved. Other regions stay, so a
    window does not contain them. None if there is no such window. Linear in the number of regions.
    """
    size = arena.rounded(nbytes)
    parts = sorted(
        [(offset, length, False) for offset, length in arena.regions.items()]
        + [(offset, length, True) for length, offset in arena._holes]
    )
    best: tuple[int, int, int] | None = None
    first = free = moved = 0
    for last, (offset, length, is_hole) in enumerate(parts):
        if not is_hole:
            if may_move(offset):
                moved += length
            else:
                first, free, moved = last + 1, 0, 0
            continue
        free += length
        # A window begins with a hole, and ends with the hole that makes the room sufficient.
        while first < last:
            _, front, front_is_hole = parts[first]
            if front_is_hole and free - front < size:
                break
            free -= front if front_is_hole else 0
            moved -= 0 if front_is_hole else front
            first += 1
        if free >= size and (best is None or moved < best[0]):
            best = moved, first, last
    if best is None:
        return None
    moved, first, last = best
    return Window(parts[first][0], [at for at, _, hole in parts[first : last + 1] if not hole], moved)


class Room(NamedTuple):
    """Steps that make a hole large enough."""

    evict: list[int]
    move: Window | None


def find_room(
    arena: Arena,
    nbytes: int,
    leaving: Sequence[int],
    victims: Sequence[int],
    last: Sequence[int],
    may_move: Callable[[int], bool],
) -> Room | None:
    """Find room for ``nbytes``, once the regions ``leaving`` are gone. Changes nothing.

    Adapters are evicted one by one, in the order of ``victims``, until there is room. A move that copies no
    more bytes than the newcomer has is preferred to the next eviction. When all of these are evicted, others
    are moved at any cost. Only then are those in ``last`` evicted, too. ``may_move`` says whether the adapter
    at an offset may be moved. None if there is no room.
    """
    size = arena.rounded(nbytes)
    if arena.free + sum(arena.regions[offset] for offset in (*leaving, *victims, *last)) < size:
        return None
    arena = arena.copy()
    for offset in leaving:
        arena.release(offset)
    evict: list[int] = []
    tries = TRIES
    for group, others in ((victims, True), (last, False)):
        in_order = iter(group)
        while not arena.fits(nbytes):
            if arena.free >= size and tries > 0:
                tries -= 1
                window = compaction(arena, nbytes, may_move)
                if window is not None and (window.moved <= size or not others):
                    return Room(evict, window)
            victim = next(in_order, None)
            if victim is None:
                window = compaction(arena, nbytes, may_move) if arena.free >= size else None
                if window is not None:
                    return Room(evict, window)
                break
            arena.release(victim)
            evict.append(victim)
    return Room(evict, None) if arena.fits(nbytes) else None
