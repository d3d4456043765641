"""The fleet's adapters as a gateway knows them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from aioengine.errors import AdapterNotFound
from aioengine.fleet.registry import Entry, Mark, answer_of
from aioengine.info import AdapterInfo, is_mix
from aioengine.model.files.sources import is_source
from aioengine.schedulers.routing import FleetState

logger = logging.getLogger("aioengine.fleet")

REFRESH_SECONDS = 10.0
"""Longest time that a replica that has come waits for what the registry knows."""
LOOK_SECONDS = 1.0
"""Shortest time from one :meth:`KnownEntries.look` to the next question to the registry."""


class KnownEntries:
    """Adapters of the configuration and of the registry, by name. :meth:`refresh` asks the registry for what
    other gateways have changed, and ``state`` is told what has come and gone.

    ``configured``: name -> path of the adapters that need not be in the registry; their version is 0.
    """

    def __init__(self, configured: Mapping[str, str], state: FleetState) -> None:
        self.by_name: dict[str, Entry] = {}
        self.in_use: Callable[[str], None] = lambda path: None
        """Callback for the path of each adapter that is put."""
        self._configured = {name: Entry(name, path, 0) for name, path in configured.items()}
        self._state = state
        self._mark: Mark | None = None
        self._refreshing = asyncio.Lock()
        self._next_look: asyncio.Task[None] | None = None
        """It waits for its time; None: nobody has asked for one."""
        self._look_due = 0.0
        for entry in self._configured.values():
            self.put(entry)

    def put(self, entry: Entry) -> None:
        self.by_name[entry.name] = entry
        self._state.add_adapter(entry.name)
        self.in_use(entry.path)

    def remove(self, name: str) -> None:
        """Forget an adapter, known or not."""
        self._state.remove_adapter(name)
        self.by_name.pop(name, None)

    def digest(self, name: str) -> str:
        """Return the digest of the content that new requests get; "" if this gateway does not know it."""
        known = self.by_name.get(name)
        return "" if known is None else known.digest

    async def content(self, adapter: str, registry: Any) -> str:
        """Return the digest of the content that "name@version" stands for; "" for a current one that nobody
        has read. Raises AdapterNotFound if the version is neither current nor one of the latest."""
        name, _, number = adapter.rpartition("@")
        known = None
        for looked in (False, True):
            known = self.by_name.get(name)
            if known is not None and number == str(known.number):
                return known.digest
            for version, digest in known.earlier.items() if known is not None else ():
                if number == str(version):
                    return digest
            if not looked:  # another gateway may have changed it
                await self.look(registry)
        if known is None:
            raise AdapterNotFound(
                f"nobody has loaded {name!r} through the fleet, and so its versions have no numbers; ask for "
                f"{name!r}, or load it first",
                name=adapter,
            )
        raise AdapterNotFound(
            f"this version is gone: the current one is {known.number}, and a replaced one goes when its "
            "last request has ended",
            name=adapter,
        )

    async def refresh(self, registry: Any) -> None:
        """Learn what has changed in the registry. Raises ConfigError if its
        checkpoint cannot be read."""
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

    async def look(self, registry: Any) -> None:
        """Refresh in time, for a request that names what this gateway does not know. However many ask, the
        registry is asked once each ``LOOK_SECONDS``: who asks meanwhile waits for the next time, because what
        it names may be newer than the last one, and all who wait share the answer."""
        if self._next_look is None:
            self._next_look = asyncio.ensure_future(self._look(registry))
        await asyncio.shield(self._next_look)

    async def _look(self, registry: Any) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(self._look_due - loop.time())
        self._next_look, self._look_due = None, loop.time() + LOOK_SECONDS
        await self.refresh_in_time(registry)

    async def refresh_in_time(self, registry: Any) -> bool:
        """Refresh within ``REFRESH_SECONDS``; if that fails, all stays as this gateway knows it. Returns
        whether it has not failed."""
        try:
            async with asyncio.timeout(REFRESH_SECONDS):
                await self.refresh(registry)
            return True
        except TimeoutError:
            logger.warning("adapters are as this gateway knows them: no answer within %g s", REFRESH_SECONDS)
        except Exception as error:  # it is being restarted, or cannot read its checkpoint
            logger.warning("adapters are as this gateway knows them: %s", error)
        return False


_SPEED = {"slot": 3, "cpu": 2, "loading": 1, "disk": 0}


def listed(current: Mapping[str, Entry], held: Iterable[AdapterInfo]) -> list[AdapterInfo]:
    """Describe each adapter once, with the fastest of the places that hold its current version; mixes are
    left out."""
    found: dict[str, AdapterInfo] = {}
    for info in held:
        entry = current.get(info.name)
        if is_mix(info.name) or (entry is not None and entry.was(info.digest)):
            continue  # only earlier requests run on a replaced version
        best = found.get(info.name)
        if best is None or _SPEED[info.location] > _SPEED[best.location]:
            found[info.name] = info
    for name in found.keys() & current.keys():
        found[name] = msgspec.structs.replace(found[name], version=current[name].number)
    return list({**{name: entry.info for name, entry in current.items()}, **found}.values())


def source_of(given: str | None, known: Entry | None, info: AdapterInfo) -> str:
    """Return where other replicas find it: the source as it was given, not one node's local copy."""
    if given is None and known is not None:
        given = known.path
    return given if given is not None and is_source(given) else info.path
