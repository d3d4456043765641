"""The arena's accounting: what is allocated, what is lost, and what comes back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aioengine.core.adapters.arena import GRANULE, Arena, find_room


def test_the_smallest_hole_that_has_room_is_taken() -> None:
    arena = Arena(10 * GRANULE)
    offsets = [arena.allocate(n * GRANULE) for n in (3, 1, 2, 1, 3)]
    assert offsets == [n * GRANULE for n in (0, 3, 4, 6, 7)]
    assert arena.allocate(1) is None
    for offset in (0, 4 * GRANULE):
        arena.release(offset)
    assert arena.allocate(GRANULE + 1) == 4 * GRANULE
    assert arena.allocate(GRANULE) == 0
    with pytest.raises(KeyError):
        arena.release(GRANULE)  # inside a region
    arena.release(0)
    with pytest.raises(KeyError):
        arena.release(0)  # twice
    arena.check()


@given(st.data())
@pytest.mark.slow
def test_the_neighbours_that_go_are_those_of_which_the_last_in_order_comes_first(data: st.DataObject) -> None:
    """Against trying all neighbours."""
    parts = data.draw(st.lists(st.tuples(st.sampled_from("hfm"), st.integers(1, 4)), min_size=1, max_size=9))
    arena = Arena(sum(size for _, size in parts) * GRANULE)
    offsets = [arena.allocate(size * GRANULE) or 0 for _, size in parts]
    for offset, (kind, _) in zip(offsets, parts, strict=True):
        if kind == "h":
            arena.release(offset)
    movable = [offset for offset, (kind, _) in zip(offsets, parts, strict=True) if kind == "m"]
    order = data.draw(st.permutations(movable))
    nbytes = data.draw(st.integers(1, 8)) * GRANULE
    found = find_room(arena, nbytes, order)
    best = None
    for first in range(len(parts)):
        for last in range(first, len(parts)):
            chosen = range(first, last + 1)
            if (
                all(parts[i][0] != "f" for i in chosen)
                and sum(parts[i][1] for i in chosen) * GRANULE >= nbytes
            ):
                worst = max((order.index(offsets[i]) for i in chosen if parts[i][0] == "m"), default=-1)
                best = worst if best is None else min(best, worst)
    assert (None if found is None else max(map(order.index, found), default=-1)) == best
    for offset in found or ():
        arena.release(offset)
    assert arena.fits(nbytes) == (found is not None)
    arena.check()
