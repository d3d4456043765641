"""Accounting of one memory that holds adapters: which adapter has which bytes, and where the holes are.

Best fit: an adapter goes into the smallest hole with room. So the waste is bounded:

- inside: each region is rounded up to whole granules, so less than one is lost to each adapter;
- between: an allocation of n bytes fails only if every hole is smaller than n. There is at most one hole more
than there are regions, so with k regions less than (k + 1) * n bytes are free then.

Moving idle adapters together makes the bytes between regions usable again: see :func:`compaction`.
Knuth, The Art of Computer Programming, volume 1, 2.5 (best fit).
"""

from __future__ import annotations

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

    @property
    def holes(self) -> dict[int, int]:
        """The size of each hole, by offset, in order."""
        found, at = {}, 0
        for offset in (*sorted(self.regions), self.size):
            if offset > at:
                found[at] = offset - at
            at = offset + self.regions.get(offset, 0)
        return found

    @property
    def free(self) -> int:
        return self.size - sum(self.regions.values())

    @property
    def largest_hole(self) -> int:
        return max(self.holes.values(), default=0)

    def rounded(self, nbytes: int) -> int:
        """Return the bytes that a region for ``nbytes`` takes."""
        return -(-max(nbytes, 1) // self.granule) * self.granule

    def copy(self) -> Arena:
        """Return a copy, for a trial."""
        other = Arena(self.size, self.granule)
        other.regions = dict(self.regions)
        return other

    def fits(self, nbytes: int) -> bool:
        return self.rounded(nbytes) <= self.largest_hole

    def allocate(self, nbytes: int) -> int | None:
        """Take a region for ``nbytes`` in the smallest hole with room. Returns its offset; None if there is
        no hole."""
        size = self.rounded(nbytes)
        fitting = [(hole, offset) for offset, hole in self.holes.items() if hole >= size]
        if not fitting:
            return None
        offset = min(fitting)[1]
        self.regions[offset] = size
        return offset

    def allocate_at(self, offset: int, nbytes: int) -> None:
        """Take a region at ``offset``, where a hole with enough room must begin."""
        size = self.rounded(nbytes)
        assert self.holes.get(offset, 0) >= size
        self.regions[offset] = size

    def release(self, offset: int) -> None:
        """Give a region back. Raises KeyError if no region begins at ``offset``."""
        del self.regions[offset]

    def check(self) -> None:
        """Assert that regions lie in the memory, and that no two share a byte."""
        at = 0
        for offset, size in sorted(self.regions.items()):
            assert at <= offset and size > 0 and size % self.granule == offset % self.granule == 0
            at = offset + size
        assert at <= self.size


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
    size, regions = arena.rounded(nbytes), arena.regions
    parts = sorted([*regions.items(), *arena.holes.items()])
    best: Window | None = None
    first = free = moved = 0
    for last, (offset, length) in enumerate(parts):
        if offset in regions:
            moved += length
            if not may_move(offset):
                first, free, moved = last + 1, 0, 0
            continue
        free += length
        # A window begins with a hole, and ends with the hole that makes the room sufficient.
        while first < last:
            front, extent = parts[first]
            if front in regions:
                moved -= extent
            elif free - extent >= size:
                free -= extent
            else:
                break
            first += 1
        if free >= size and (best is None or moved < best.moved):
            inside = [at for at, _ in parts[first : last + 1] if at in regions]
            best = Window(parts[first][0], inside, moved)
    return best


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
    size, tries = arena.rounded(nbytes), TRIES
    if arena.free + sum(arena.regions[offset] for offset in (*leaving, *victims, *last)) < size:
        return None
    arena = arena.copy()
    for offset in leaving:
        arena.release(offset)
    evict: list[int] = []
    waiting = [*victims, *last]
    while not arena.fits(nbytes):
        at_any_cost = len(evict) >= len(victims)
        if arena.free >= size and (tries > 0 or len(evict) in (len(victims), len(victims) + len(last))):
            tries -= 1
            window = compaction(arena, nbytes, may_move)
            if window is not None and (window.moved <= size or at_any_cost):
                return Room(evict, window)
        if len(evict) == len(waiting):
            return None
        evict.append(waiting[len(evict)])
        arena.release(evict[-1])
    return Room(evict, None)
