"""AdapterNames: the version of an adapter that a name in a request stands for."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager

from aioengine.adapters.resolvers.base import AdapterResolver
from aioengine.adapters.resolvers.sources import NAME_RULE
from aioengine.core.adapters.name import AdapterName
from aioengine.core.state import AdapterEntry, where_is
from aioengine.errors import AdapterNotFound, frameless
from aioengine.request import RequestOptions
from aioengine.runtime.loop import EngineLoop
from aioengine.runtime.sources.lookup import Lookups
from aioengine.schedulers.policy import Location


class AdapterNames:
    """Versions of adapters by name: registered ones, those that a look-up finds, and mixes."""

    def __init__(
        self, loop: EngineLoop, resolver: AdapterResolver | None, resolve_timeout: float | None
    ) -> None:
        self._loop = loop
        self.lookups = Lookups(loop, resolver, resolve_timeout)
        self.table = loop.core.residency.names

    # What a request asks for

    def check_wanted(self, options: RequestOptions) -> tuple[str, AdapterEntry | None]:
        """Check what a request asks for before any work is done for it. Returns the (first) adapter's name,
        and the version if nothing has to be looked up or mixed.

        Raises AdapterNotFound for a name that is neither registered nor resolvable. For an adapter that has
        failed more than once in a row, raises its last error again for a while."""
        entry: AdapterEntry | None = None
        for name in options.named:
            entry = self.find(name)
            if entry is None or entry.location is Location.DISK:
                self.table.of(name).check_worth_a_try(self._loop.now())
        return options.named[0].partition("@")[0], None if options.mix else entry

    def where(self, names: Sequence[str]) -> str:
        """Name what a request asks for and where it is, for the message of an error."""
        places = []
        for name in names:
            try:
                entry = self.find(name)
            except AdapterNotFound:  # unloaded since
                entry = None
            places.append(f" for adapter {name!r} (not looked up yet)" if entry is None else where_is(entry))
        return ",".join(places)

    # Versions

    def find(self, name: str) -> AdapterEntry | None:
        """Return the version that a name stands for; None if it has to be looked up first. Raises
        AdapterNotFound for a name that is neither registered nor resolvable."""
        known = self.table.of(name)
        if known.is_known:
            return known.current
        if isinstance(name, str) and "@" in name:
            label, _, version = name.partition("@")
            return None if self.find(label) is None else self.table.of(label).resolve(version)
        good = isinstance(name, str) and NAME_RULE.fullmatch(name) is not None
        if not good or self.lookups.resolver is None:
            raise self.table.not_found(name)
        return None

    def lock(self, known: AdapterName) -> AbstractAsyncContextManager[None]:
        """Return the lock under which versions of a name are looked up or read."""
        known.lock = known.lock or asyncio.Lock()
        return known.lock

    async def acquire(self, name: str, tenant: str | None = None) -> AdapterEntry:
        """Return the current version; if there is none, register what is found for ``tenant``. Raises as
        :meth:`Lookups.find`, and AdapterNotFound if it was unloaded meanwhile."""
        found = self.find(name)
        if found is None:
            label, at, version = name.partition("@")
            await self.lookups.find(label, tenant)
            found = self.table.of(label).resolve(version if at else None)
        return found

    async def read(self, entry: AdapterEntry, *, now: bool) -> None:
        """Have a version read, and wait until it is in the CPU cache or, without ``now``, until it has ever
        been read. One that was replaced is read for its requests alone; without any it goes, unread.

        When the last caller leaves, whether it was read or they gave up, nobody wants it any more.
        """

        def is_read() -> bool:
            lives = entry.uid in self.table.entries
            if entry.location in (Location.CPU, Location.SLOT) if now else (entry.digest or not lives):
                return True
            if entry.error is not None:
                raise frameless(entry.error)
            return now and lives and entry.location is Location.DISK and entry.wanted_since is None

        if not now and entry.digest:
            return
        entry.readers += 1
        try:
            if now or (entry.wanted_since is None and not entry.retired):
                self.table.of(entry.label).load(self._loop.now(), entry)
                self._loop.wake()
            await self._loop.until(is_read, entry.label)
        finally:
            entry.readers -= 1
            if not entry.readers and not entry.pinned:
                # A pinned adapter is read again after a loss of the device.
                self.table.forget_want(entry)
