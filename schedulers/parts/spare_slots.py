"""Slots that can be given to other adapters, and the bytes that they free."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

from aioengine.schedulers.parts.base import Replacement
from aioengine.schedulers.parts.clients import Client, Clients
from aioengine.schedulers.policy import AdapterView, Place, SchedulerView, SlotState, SlotView


class HeldSlot(NamedTuple):
    """A slot that other adapters could get."""

    slot: SlotView
    name: str
    users: tuple[Client, ...]
    """Clients that run in it or wait for its adapter."""


class SpareSlots:
    """Free slots, and idle ones whose adapters no request waits for, the least valuable first."""

    def __init__(
        self, view: SchedulerView, replace: Replacement, names: Sequence[str | None], clients: Clients
    ) -> None:
        self._view, self._replace, self._clients = view, replace, clients
        self._free = [i for i, name in enumerate(names) if name is None] if None in names else []
        self._memory = view.memory if view.memory.elastic else None
        self.free_bytes = 0 if self._memory is None else self._memory.free
        """Free bytes of the memory that slots share, if they do."""
        self.taken: set[str] = set()
        """Adapters whose slots have been given away."""

    def has_any(self) -> bool:
        return self._has_unwanted() or bool(self._free and (self._memory is None or self.free_bytes > 0))

    def take(self, name: str) -> tuple[Place, list[str]] | None:
        """Take a slot for an adapter. Returns it with the adapters that leave for it; None if too few bytes
        can be freed. Call it only if there is a slot."""
        if self._memory is None:
            if self._free:
                return Place(name, self._free.pop()), []
            return Place(name, self._leave().index), []
        need = self._memory.bytes_of(name)
        names = [slot.adapter for slot in self._unwanted if slot.adapter not in self.taken]
        if need > self.free_bytes + sum(self._memory.bytes_of(name) for name in names if name is not None):
            return None
        evict = self.make_room(need)
        self._free.pop()
        self.free_bytes -= need
        return Place(name), evict

    def make_room(self, need: int) -> list[str]:
        """Evict adapters that no request waits for, until ``need`` bytes of the memory and a slot are free,
        or all of them have left."""
        assert self._memory is not None
        evict: list[str] = []
        while (need > self.free_bytes or not self._free) and self._has_unwanted():
            slot = self._leave()
            assert slot.adapter is not None
            self._free.append(slot.index)
            self.free_bytes += self._memory.bytes_of(slot.adapter)
            evict.append(slot.adapter)
        return evict

    def _leave(self) -> SlotView:
        slot = self._unwanted.pop()
        assert slot.adapter is not None
        self.taken.add(slot.adapter)
        return slot

    def _has_unwanted(self) -> bool:
        while self._unwanted and self._unwanted[-1].adapter in self.taken:
            self._unwanted.pop()
        return bool(self._unwanted)

    @cached_property
    def _unwanted(self) -> list[SlotView]:
        scored: list[tuple[float, int, SlotView]] = []
        for name in self._clients.idle:
            if name is not None and not self._clients.waiting_for(name):
                adapter = self._view.adapters[name]
                slot = slot_of(self._view, adapter)
                if slot is not None:
                    scored.append((self._replace.score(self._view, slot, adapter), slot.index, slot))
        return [slot for _, _, slot in sorted(scored, key=lambda item: item[:2], reverse=True)]


class RoomByBytes:
    """The slots that make room for an adapter in the memory that they share."""

    def __init__(self, view: SchedulerView, spare: SpareSlots, name: str, refused: int) -> None:
        self.name = name
        self.refused = refused
        """Times that the core found no room although enough bytes were free; then more are freed."""
        self.found: list[HeldSlot] = []
        self.missing = view.memory.bytes_of(name) * (1 + refused)
        """Bytes."""
        self.evict = spare.make_room(self.missing)
        self.missing -= spare.free_bytes
        spare.free_bytes = max(0, -self.missing)
        self._view = view

    def add(self, found: HeldSlot) -> None:
        self.found.append(found)
        self.missing -= self._view.memory.bytes_of(found.name)


def slot_of(view: SchedulerView, adapter: AdapterView) -> SlotView | None:
    """Return the slot that it could give up."""
    slot = None if adapter.slot is None else view.slots[adapter.slot]
    return slot if slot is not None and slot.state is SlotState.READY and not slot.pinned else None
