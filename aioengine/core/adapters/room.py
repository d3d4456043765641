"""Finds room for an adapter in the memory that slots share: a hole, or moves and evictions that make one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from aioengine.core.adapters.arena import Arena, Window, compaction, rounded
from aioengine.core.adapters.slots import Slot

TRIES = 3
"""How often, between evictions, it looks whether moving is enough: it goes through all regions."""


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
    """Room for ``nbytes``, once the adapters of the slots ``leaving`` are gone; nothing is changed.

    Adapters are evicted in the order of ``victims``, and no more of them than are needed. Before that, others
    are moved if that copies no more bytes than the newcomer has; after it, whatever it takes; and only then
    are those in ``last`` evicted, too. ``may_move`` says of an offset whether what is there may be moved.
    None if there is no room.
    """
    size = rounded(nbytes)
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
