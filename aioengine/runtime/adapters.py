"""The adapters' life cycle as callers see it: register, load, replace, pin, unload."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from typing import TypedDict

from aioengine.adapters.resolvers.sources import check_same_path, checked_path
from aioengine.core.adapters.name import AdapterName, frameless
from aioengine.core.adapters.version import Life
from aioengine.core.state import AdapterEntry, AdapterFiles
from aioengine.errors import AdapterNotFound, AioEngineError
from aioengine.info import AdapterInfo
from aioengine.model.files.sources import is_source
from aioengine.runtime.loop import EngineLoop
from aioengine.runtime.sources.mixes import is_mix, parts_of
from aioengine.runtime.sources.names import AdapterNames
from aioengine.runtime.stats import adapter_info
from aioengine.schedulers.policy import Location


class LoadFlags(TypedDict, total=False):
    """How an adapter is loaded: ``AsyncEngine.load_adapter`` describes them."""

    pin: bool
    replace: bool


class AdapterOps:
    """Operations on adapters, on the event loop; those that wait can be cancelled at any point."""

    def __init__(self, loop: EngineLoop, names: AdapterNames) -> None:
        self._loop = loop
        self._core = loop.core
        self._residency = loop.core.residency
        self._names = names
        self._table = names.table

    # Registering and loading

    def register(self, name: str, path: str | os.PathLike[str]) -> AdapterInfo:
        where = checked_path(name, path)
        known = self._table.of(name)
        registered = _registered_path(known)
        if registered is not None:
            check_same_path(name, registered, where)
        elif is_source(where):
            known.source = where
            self._table.keep(known)
        else:
            known.register(where, _now())
            self._loop.wake()
        return self.info(name)

    async def load(
        self,
        name: str,
        path: str | os.PathLike[str] | None,
        *,
        held: AdapterFiles | None = None,
        pin: bool = False,
        replace: bool = False,
        force_pin: bool = False,
    ) -> AdapterInfo:
        """Load an adapter. ``held`` has its files in memory; ``path`` is then only a name for messages."""
        if pin and held is None and path is None:
            self._names.check_known(name)  # or else its pin may be refused first
        source = checked_path(name, path) if held is None and path is not None else None
        with self._claimed(name, force=force_pin) if pin else nullcontext():
            async with self._alone(name) as known:
                with known.load():
                    registered = _registered_path(known)
                    given = source if held is None else str(path)
                    if given is not None and registered is not None and not replace:
                        check_same_path(name, registered, given)
                        source = None  # it is the registered path
                    if held is not None:
                        entry = known.declare(str(path), files=held)
                    elif source is None and not (replace and known.current):
                        entry = await self._names.acquire(name, check=known.check_not_unloaded)
                    else:
                        entry = await self._new_version(known, source)
                    await self._read(entry, known, pin=pin)
            if pin:
                await self._loop.until(lambda: self._is_in_slot(name), name)
        return self.info(name)

    @asynccontextmanager
    async def _alone(self, name: str) -> AsyncIterator[AdapterName]:
        """Take the name's lock."""
        known = self._table.of(name)
        known.lock = known.lock or asyncio.Lock()
        known.users += 1
        self._table.keep(known)
        try:
            async with known.lock:
                yield known
        finally:
            known.users -= 1
            self._table.keep(known)

    async def _new_version(self, known: AdapterName, source: str | None) -> AdapterEntry:
        """Declare a version without publishing it. With ``source`` None it comes from the registered path,
        looked up again if necessary."""
        source = known.source if source is None else source
        if source is None:
            current = known.resolve()
            files = None if current.files is None else current.files.share()
            return known.declare(current.path, files=files)
        if source and not is_source(source):
            return known.declare(source)
        where = await self._names.lookups.locate(known.label, source, check=known.check_not_unloaded)
        return known.declare(where, source=source)

    async def _read(self, entry: AdapterEntry, known: AdapterName, *, pin: bool) -> None:
        """Have a version read, and published unless it is held. If that fails, a new one goes."""
        try:
            await self._names.read(entry, now=True, pin=pin, check=known.check_not_unloaded)
        except BaseException:
            entry.pin_when_read = False  # others may still want it, but without a pin
            if known.current is not entry and not entry.retired:
                known.retire(entry, _now())
                self._loop.wake()
            raise

    async def labels(self, name: str) -> int:
        """Return how many labels the head of a version has. Reads it if it was never read."""
        self._names.check_known(name)
        await self._names.read(await self._names.acquire(name), now=False)
        entry = await self._names.acquire(name)  # it may have been replaced meanwhile

        def is_read() -> bool:
            self._names.check_lives(entry)
            if entry.error is not None and not entry.digest:
                raise frameless(entry.error)
            return bool(entry.digest)

        await self._loop.until(is_read, entry.label)  # a replaced version is read for the requests on it
        return entry.labels

    def holds(self, held: AdapterFiles) -> bool:
        """Whether a version has these files."""
        return any(entry.files is held for entry in self._residency.entries.values())

    # Replacing in two steps

    async def prepare(
        self, name: str, path: str | os.PathLike[str] | None = None, *, read: bool = True
    ) -> AdapterInfo:
        """Make the next version of an adapter ready for :meth:`commit`. With ``read=False`` it is read when a
        request first needs it."""
        source = None if path is None else checked_path(name, path)
        async with self._alone(name) as known:
            with known.load():
                self.discard(name)
                entry = await self._new_version(known, source)
                entry.held = True
                if read:
                    await self._read(entry, known, pin=False)
                known.prepared = entry
        return adapter_info(entry)

    def commit(self, name: str) -> AdapterInfo:
        """Let new requests use the prepared version. Raises AdapterNotFound if there is none."""
        known = self._table.of(name)
        entry = known.take_prepared()
        if entry is None:
            raise AdapterNotFound("no version of it was prepared; call prepare first", name=name)
        known.replace(entry, _now())
        self._loop.wake()
        return self.info(name)

    def discard(self, name: str) -> None:
        """Drop the prepared version, if there is one."""
        known = self._table.of(name)
        entry = known.take_prepared()
        if entry is not None:
            known.retire(entry, _now())
            self._loop.wake()

    def expect(self, name: str, digest: str) -> None:
        """Accept only this content (``AdapterInfo.digest``) under a known name, until it is replaced or
        unloaded: if its files differ later, its requests fail with AdapterChanged. Raises AdapterNotFound."""
        self._names.check_known(name)
        self._table.of(name).expect(digest)

    # Unloading

    async def unload(self, name: str, *, force: bool) -> None:
        """Unload an adapter. Loads that are under way, or wait for the lock, fail."""
        known = self._table.of(name)
        was_loading = known.loading
        known.unloads += 1
        self._table.keep(known)
        self._loop.ask_again(name)
        try:
            async with self._alone(name):
                entry, was_fetched = known.current, bool(known.source)
                if entry is not None:
                    self._loop.check_goes_on()
                    self._names.mixes.forget(name, _now())
                known.unload(_now())
                if entry is None:
                    if was_fetched or was_loading:
                        return  # it was never needed, or its load was ended: there is nothing to free
                    raise self._table.not_found(name)
                if force:
                    self._abort_all(entry)
                self._loop.wake()
                await self._loop.until(lambda: entry.uid not in self._residency.entries, name)
        finally:
            known.unloads -= 1
            self._table.keep(known)

    def _abort_all(self, entry: AdapterEntry) -> None:
        for request in list(self._core.requests.values()):
            if request.adapter is not None and entry in parts_of(request.adapter):
                self._core.end(request, "abort", _now())

    # Pinning

    async def unpin(self, name: str) -> AdapterInfo:
        self._table.of(name).unpin(_now())
        self._loop.wake()
        return self.info(name)

    @contextmanager
    def _claimed(self, name: str, *, force: bool) -> Iterator[None]:
        """Context of a caller who pins a name."""
        try:
            with self._table.of(name).claim(force=force, clock=_now):
                yield
        finally:
            self._loop.wake()

    def _is_in_slot(self, name: str) -> bool:
        """Whether the adapter is in a slot, or no longer pinned. Raises AdapterNotFound if it is unloaded, or
        the reason why it gets no slot."""
        entry = self._table.current.get(name)
        if entry is None:
            raise AdapterNotFound("it was unloaded while it waited for a slot", name=name)
        if entry.location is Location.SLOT or not entry.pinned:
            return True
        if entry.error is not None:
            raise frameless(entry.error)
        return False

    # What there is; mixes are left out

    def all(self) -> list[AdapterInfo]:
        """Describe every registered adapter."""
        found = map(self._describe, self._table.in_use.values())
        return [info for info in found if info is not None]

    def _describe(self, known: AdapterName) -> AdapterInfo | None:
        if known.current is not None:
            return None if is_mix(known.current) else adapter_info(known.current)
        return AdapterInfo(name=known.label, path=known.source) if known.source else None

    def count(self) -> int:
        """Return the number of registered adapters; a mix counts, too."""
        return sum(known.is_known for known in self._table.in_use.values())

    def busy(self) -> list[AdapterInfo]:
        """Return the registered adapters that hold memory, will soon, or have requests that wait."""
        waited_for = [entry for entry in self._core.queues.heads.values() if entry is not None]
        entries = dict.fromkeys([*self._core.cpu.entries.values(), *waited_for])
        return [adapter_info(e) for e in entries if e.life is Life.CURRENT and not is_mix(e)]

    def resident(self) -> list[AdapterInfo]:
        """Return the adapters that hold memory or will soon hold it, mixes included."""
        return [adapter_info(entry) for entry in self._core.cpu.entries.values()]

    def replaced(self) -> list[AdapterInfo]:
        """Return the replaced versions that requests still need, wherever they are."""
        return [adapter_info(entry) for entry in self._residency.replaced() if not is_mix(entry)]

    def find(self, name: str) -> AdapterInfo | None:
        """Return the adapter's present state; None if it is not registered."""
        return self._describe(self._table.of(name))

    def info(self, name: str) -> AdapterInfo:
        """Return the adapter's present state. Raises AdapterNotFound."""
        return self.find(name) or adapter_info(self._table.of(name).resolve())

    def close(self, error: AioEngineError) -> None:
        """Stop all look-ups; callers that wait for one get ``error``."""
        self._names.lookups.close(error)


def _registered_path(known: AdapterName) -> str | None:
    """Return the path as it was given; None if the name is free."""
    return known.source or (None if known.current is None else known.current.path)


def _now() -> float:
    return asyncio.get_running_loop().time()
