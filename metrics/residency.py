"""Which adapter versions are on the CPU and in the slots, as told by the events."""

from __future__ import annotations

from typing import Literal, NamedTuple

from aioengine import events

Level = Literal["slot", "cpu"]


class Lookup(NamedTuple):
    """One look into one cache level."""

    level: Level
    hit: bool


class ResidencyTracker:
    """Follows the adapter events, so that a new request can be told to be a hit or a miss."""

    def __init__(self) -> None:
        self._current: dict[str, int] = {}
        self._cpu: set[tuple[str, int]] = set()
        self._slot: set[tuple[str, int]] = set()
        self.ranks: dict[tuple[str, int], int] = {}
        """Rank of each (adapter, version) that has been read and not been unloaded."""

    def registered(self, event: events.AdapterRegistered) -> None:
        self._current[event.adapter] = event.version

    def loaded(self, event: events.AdapterLoaded) -> None:
        key = (event.adapter, event.version)
        self._cpu.add(key)
        self.ranks[key] = event.rank

    def placed(self, event: events.AdapterPlaced) -> None:
        key = (event.adapter, event.version)
        self._slot.add(key)
        self.ranks[key] = event.rank

    def evicted(self, event: events.AdapterEvicted) -> None:
        level = self._slot if event.level == "slot" else self._cpu
        level.discard((event.adapter, event.version))

    def unloaded(self, event: events.AdapterUnloaded) -> None:
        key = (event.adapter, event.version)
        self._cpu.discard(key)
        self._slot.discard(key)
        self.ranks.pop(key, None)
        if self._current.get(event.adapter) == event.version:
            del self._current[event.adapter]

    def lookup(self, adapter: str) -> tuple[Lookup, ...]:
        """What a request for ``adapter`` finds now; the CPU is asked only if no slot has it."""
        key = (adapter, self._current.get(adapter, 0))
        if key in self._slot:
            return (Lookup("slot", True),)
        return (Lookup("slot", False), Lookup("cpu", key in self._cpu))
