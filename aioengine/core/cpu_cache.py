"""The CPU adapter cache's accounting: who is in, and who may be asked to leave.

Adapters in slots stay in the cache too, so that a slot can be given up without a copy back.

What somebody waits for is not evicted under him, with one exception that keeps the cache fair: whoever
has waited longer may take the place of an adapter that is needed only by later requests. Without the
exception, a few busy adapters could keep a cold one out for ever.
"""

from __future__ import annotations

from aioengine.core.state import AdapterEntry
from aioengine.schedulers.policy import Location


class CpuCache:
    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.entries: dict[int, AdapterEntry] = {}
        """Resident, or being read, by uid."""

    @property
    def room(self) -> int:
        return self.capacity - len(self.entries)

    def add(self, entry: AdapterEntry) -> None:
        assert self.room > 0 and entry.uid not in self.entries
        self.entries[entry.uid] = entry

    def remove(self, entry: AdapterEntry) -> None:
        del self.entries[entry.uid]

    def victim(self, newcomer: AdapterEntry, now: float, keep: set[int]) -> AdapterEntry | None:
        """The least recently used adapter that may go for ``newcomer``; None if all must stay.

        Adapters outside the slots go first, then those in idle slots; within each, those nobody waits
        for before those that only later requests wait for. Those in slots whose uid is in ``keep``,
        because this step admits to them, stay.
        """
        since = newcomer.needed_since
        limit = now if since is None else since
        best: AdapterEntry | None = None
        best_key: tuple[bool, bool, float] | None = None
        for entry in self.entries.values():
            needed = entry.needed_since
            if entry.location is Location.SLOT and entry.uid in keep:
                continue
            if not self._movable(entry) or (needed is not None and needed <= limit):
                continue
            key = (entry.location is Location.SLOT, needed is not None, entry.last_used)
            if best_key is None or key < best_key:
                best, best_key = entry, key
        return best

    @staticmethod
    def _movable(entry: AdapterEntry) -> bool:
        if entry.pinned or entry.running:
            return False
        if entry.location is Location.SLOT:
            return True
        return entry.location is Location.CPU and entry.slot is None  # not being copied to a slot

    def check(self) -> None:
        assert len(self.entries) <= self.capacity
        assert all(e.location is not Location.DISK for e in self.entries.values())
