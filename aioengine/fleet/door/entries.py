"""The fleet's adapters as a door knows them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from aioengine.fleet.registry import Entry, Mark, answer_of
from aioengine.schedulers.routing import FleetState


class KnownEntries:
    """Adapters of the configuration and of the registry, by name. :meth:`refresh` asks the registry for what
    other doors have changed, and ``state`` is told what has come and gone.

    ``configured``: name -> path of the adapters that need not be in the registry; their version is 0.
    """

    def __init__(self, configured: Mapping[str, str], state: FleetState) -> None:
        self.by_name: dict[str, Entry] = {}
        self._configured = {name: Entry(name, path, 0) for name, path in configured.items()}
        self._state = state
        self._mark: Mark | None = None
        self._refreshing = asyncio.Lock()
        for entry in self._configured.values():
            self.put(entry)

    def put(self, entry: Entry) -> None:
        self.by_name[entry.name] = entry
        self._state.add_adapter(entry.name)

    def remove(self, name: str) -> bool:
        """Forget an adapter. Returns whether it was known."""
        self._state.remove_adapter(name)
        return self.by_name.pop(name, None) is not None

    async def refresh(self, registry: Any) -> None:
        """Learn what has changed in the registry. Raises ConfigError if its checkpoint cannot be read."""
        async with self._refreshing:
            changes = await answer_of(registry.changes.remote(self._mark))
            gone = set(changes.removed)
            if changes.whole:
                gone = self.by_name.keys() - self._configured.keys() - {e.name for e in changes.entries}
            for name in gone:
                self.remove(name)
            for entry in changes.entries:
                self.put(entry)
            self._mark = changes.mark
