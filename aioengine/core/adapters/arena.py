"""Accounting of one memory that holds adapters: which adapter has which bytes, and where the holes are.

Best fit: an adapter goes into the smallest hole with room. So the waste is bounded:

- inside: each region is rounded up to whole granules, so less than one is lost to each adapter;
- between: an allocation of n bytes fails only if every hole is smaller than n. There is at most one hole more
than there are regions, so with k regions less than (k + 1) * n bytes are free then.

Where holes are too small, idle neighbours have to go: see :func:`find_room`.
Knuth, The Art of Computer Programming, volume 1, 2.5 (best fit).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

GRANULE = 256
"""Bytes of the smallest granule: rows of any dtype are whole vectors."""


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

    def of(self, offsets: Iterable[int | None]) -> Arena:
        """Return a copy, for a trial, with only those of its regions that begin at these ``offsets``."""
        other = Arena(self.size, self.granule)
        other.regions = {offset: self.regions[offset] for offset in offsets if offset is not None}
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


def find_room(arena: Arena, nbytes: int, order: Sequence[int]) -> list[int] | None:
    """Return which regions have to go so that one hole has room for ``nbytes``: [] if one has it already,
    None if they cannot make it. Changes nothing.

    Only those whose offsets are in ``order`` may go. They are neighbours, and of all such neighbours those of
    which the last in that order comes first. Linear in the number of regions, but for a sort.
    """
    if arena.fits(nbytes):
        return []
    if order and arena.regions[order[0]] >= arena.rounded(nbytes):
        return [order[0]]  # no other can come before the first
    places = {offset: place for place, offset in enumerate(order)}
    parts = sorted([*arena.regions.items(), *arena.holes.items()])
    best: list[int] | None = None
    first = together = 0
    for last, (offset, length) in enumerate(parts):
        if offset in arena.regions and offset not in places:
            first, together = last + 1, 0
            continue
        together += length
        while together - parts[first][1] >= arena.rounded(nbytes):
            together -= parts[first][1]
            first += 1
        if together >= arena.rounded(nbytes):
            inside = [places[at] for at, _ in parts[first : last + 1] if at in places]
            inside.sort(reverse=True)
            best = inside if best is None else min(best, inside)
    return None if best is None else [order[place] for place in reversed(best)]
