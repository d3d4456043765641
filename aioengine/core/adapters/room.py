"""Finds room for an adapter in the slots' memory: a hole, or moves and evictions that make one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from aioengine.core.adapters.arena import Arena, Window, compaction
from aioengine.core.adapters.slots import Slot

TRIES = 3
"""Maximum number of searches for a window between evictions; each search visits all regions."""


class Room(NamedTuple):
    """Steps that make a hole large enough."""

    evict: list[Slot]
    move: Window | None


def find_room(
    arena: Arena,
    nbytes: int,
    leaving: Sequence[Slot],
    victims: Sequence[Slot],
    last: Sequence[Slot],
    may_move: Callable[[int], bool],
) -> Room | None:
    """Find room for ``nbytes``, once the adapters of the slots ``leaving`` are gone. Changes nothing.

    Adapters are evicted one by one, in the order of ``victims``, until there is room. A move that copies no
    more bytes than the newcomer has is preferred to the next eviction. When all of these are evicted, others
    are moved at any cost. Only then are those in ``last`` evicted, too. ``may_move`` says whether the adapter
    at an offset may be moved. None if there is no room.
    """
    size = arena.rounded(nbytes)
    slots = (*leaving, *victims, *last)
    if arena.free + sum(arena.regions[slot.offset] for slot in slots if slot.offset is not None) < size:
        return None
    arena = arena.copy()
    for slot in leaving:
        assert slot.offset is not None
        arena.release(slot.offset)
    evict: list[Slot] = []
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
            assert victim.offset is not None
            arena.release(victim.offset)
            evict.append(victim)
    return Room(evict, None) if arena.fits(nbytes) else None
