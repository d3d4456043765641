"""The adapters' life cycle as callers see it: register, load, replace, pin, unload."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext

from aioengine.adapters.names import check_same_path, checked_path
from aioengine.core.adapters.failures import frameless
from aioengine.core.adapters.name import AdapterName
from aioengine.core.state import AdapterEntry, AdapterFiles
from aioengine.errors import AdapterNotFound, AioEngineError
from aioengine.info import AdapterInfo
from aioengine.model.files.hub import is_source
from aioengine.runtime.loop import EngineLoop
from aioengine.runtime.sources.names import AdapterNames
from aioengine.runtime.stats import adapter_info
from aioengine.schedulers.policy import Location


class AdapterOps:
    """Operations on adapters. All methods run on the event loop; those that wait can be cancelled at any
    point. ``names`` finds the versions that names stand for."""

    def __init__(self, stepper: EngineLoop, names: AdapterNames) -> None:
        self._stepper = stepper
        self._core = stepper.core
        self._residency = stepper.core.residency
        self._names = names
        self._table = names.table

    # Registering

    def register(self, name: str, path: str | os.PathLike[str]) -> AdapterInfo:
        where = checked_path(name, path)
        known = self._registered_path(name)
        if known is not None:
            check_same_path(name, known, where)
        elif is_source(where):
            self._table.of(name).look_up(where)
        else:
            entry = self._names.publish(name, where)
            # Or else the first list would describe thousands.
            self._table.of(name).described = adapter_info(entry)
        return self.info(name)

    def _registered_path(self, name: str) -> str | None:
        """Return the path as it was given; None if the name is free."""
        entry = self._residency.current.get(name)
        return self._names.source(name) or (None if entry is None else entry.path)

    # Loading

    async def load(
        self,
        name: str,
        path: str | os.PathLike[str] | None,
        *,
        pin: bool,
        replace: bool,
        force_pin: bool = False,
        held: AdapterFiles | None = None,
    ) -> AdapterInfo:
        """Load an adapter. ``held`` has its files in memory; ``path`` is then only a name for messages."""
        if pin and held is None and path is None:
            self._names.check_known(name)  # or else its pin may be refused first
        with self._claimed(name, force=force_pin) if pin else nullcontext():
            async with self._alone(name) as known:
                with known.load():
                    if held is None:
                        await self._load_version(known, path, pin=pin, replace=replace)
                    else:
                        await self._load_held(known, held, str(path), pin=pin, replace=replace)
            if pin:
                await self._stepper.until(lambda: self._is_in_slot(name), name)
        return self.info(name)

    async def labels(self, name: str) -> int:
        """Return how many labels the head of a version has; without "@version", of the current one. Reads it
        if it was never read."""
        self._names.check_known(name)
        entry = await self._names.acquire(name)
        if not entry.digest and not entry.retired:
            await self.load(entry.label, None, pin=False, replace=False)
            entry = await self._names.acquire(name)  # it may have been replaced meanwhile

        def is_read() -> bool:
            self._names.check_lives(entry)
            if entry.error is not None and not entry.digest:
                raise frameless(entry.error)
            return bool(entry.digest)

        await self._stepper.until(is_read, entry.label)  # a replaced version is read for the requests on it
        return entry.labels

    @contextmanager
    def _claimed(self, name: str, *, force: bool) -> Iterator[None]:
        """Context that counts ``name`` as pinned; if the block fails, the pin is removed, unless other
        callers hold one."""
        self._table.claim(name, force=force)
        failed = True
        try:
            yield
            failed = False
        finally:
            self._table.release(name, _now(), failed=failed)
            self._stepper.wake()

    def _is_in_slot(self, name: str) -> bool:
        """Whether the adapter is in a slot, or no longer pinned. Raises AdapterNotFound if it is unloaded, or
        the reason why it gets no slot."""
        entry = self._residency.current.get(name)
        if entry is None:
            raise AdapterNotFound("it was unloaded while it waited for a slot", name=name)
        if entry.location is Location.SLOT or not entry.pinned:
            return True
        if entry.error is not None:
            raise frameless(entry.error)
        return False

    async def _load_version(
        self, known: AdapterName, path: str | os.PathLike[str] | None, *, pin: bool, replace: bool
    ) -> None:
        name = known.label
        source = None if path is None else checked_path(name, path)
        registered = self._registered_path(name)
        if source is not None and registered is not None and not replace:
            check_same_path(name, registered, source)
            source = None  # it is the registered path
        if source is None and not (replace and self._names.is_registered(name)):
            entry = await self._names.acquire(name, check=known.check_not_unloaded)
        else:
            entry = await self._new_version(known, source)
        await self._read(entry, known, pin=pin)
        _found_at(known, source)

    async def _load_held(
        self, known: AdapterName, held: AdapterFiles, path: str, *, pin: bool, replace: bool
    ) -> None:
        registered = self._registered_path(known.label)
        if registered is not None and not replace:
            check_same_path(known.label, registered, path)
        await self._read(self._residency.declare(known.label, path, files=held), known, pin=pin)
        known.forget_source()

    def holds(self, held: AdapterFiles) -> bool:
        """Whether a version has these files."""
        return any(entry.files is held for entry in self._residency.entries.values())

    @asynccontextmanager
    async def _alone(self, name: str) -> AsyncIterator[AdapterName]:
        """Take the name's lock."""
        known = self._table.of(name)
        known.lock = known.lock or asyncio.Lock()
        known.users += 1
        try:
            async with known.lock:
                yield known
        finally:
            known.users -= 1
            self._table.tidy(known)

    async def _new_version(self, known: AdapterName, source: str | None) -> AdapterEntry:
        """Declare a version without publishing it. With ``source`` None it comes from the registered path,
        looked up again if necessary."""
        name = known.label
        if source is None and not known.looked_up:
            current = self._names.find(name)
            files = None if current.files is None else current.files.share()
            return self._residency.declare(name, current.path, files=files)
        if source is not None and not is_source(source):
            return self._residency.declare(name, source)
        where = await self._names.lookups.locate(name, source or known.source, check=known.check_not_unloaded)
        return self._residency.declare(name, where, found=True)

    async def _read(self, entry: AdapterEntry, known: AdapterName, *, pin: bool) -> None:
        """Ask for a read, and wait until it is in the CPU cache and, unless it is held, published."""

        def is_read() -> bool:
            if entry.location is Location.CPU or entry.location is Location.SLOT:
                return True
            known.check_not_unloaded()
            if entry.error is not None:
                raise frameless(entry.error)
            return False

        with self._names.reading(entry):
            self._residency.want(entry, _now(), pin=pin)
            self._stepper.wake()
            try:
                await self._stepper.until(is_read, entry.label)
            except BaseException:
                entry.pin_when_read = False  # others may still want it, but without a pin
                if self._residency.current.get(entry.label) is not entry and not entry.retired:
                    self._residency.retire(entry, _now())
                    self._stepper.wake()
                raise

    # Replacing in two steps

    async def prepare(
        self, name: str, path: str | os.PathLike[str] | None = None, *, read: bool = True
    ) -> AdapterInfo:
        """Make the next version of an adapter ready, as ``load_adapter(..., replace=True)`` does, but do not
        let requests use it yet. With ``read=False`` it is read when a request first needs it."""
        source = None if path is None else checked_path(name, path)
        async with self._alone(name) as known:
            with known.load():
                self.discard(name)
                entry = await self._new_version(known, source)
                entry.held = True
                if read:
                    await self._read(entry, known, pin=False)
                known.prepared = entry, source
        return adapter_info(entry)

    def commit(self, name: str) -> AdapterInfo:
        """Let new requests use the prepared version. Raises AdapterNotFound if there is none."""
        known = self._table.find(name)
        entry, source = (None, None) if known is None else known.take_prepared()
        if known is None or entry is None:
            raise AdapterNotFound("no version of it was prepared; call prepare first", name=name)
        self._residency.publish(entry, _now())
        _found_at(known, source)
        self._table.tidy(known)
        self._stepper.wake()
        return self.info(name)

    def discard(self, name: str) -> None:
        """Drop the prepared version, if there is one."""
        known = self._table.find(name)
        entry, _ = (None, None) if known is None else known.take_prepared()
        if known is not None and entry is not None:
            self._table.tidy(known)
            self._residency.retire(entry, _now())
            self._stepper.wake()

    def expect(self, name: str, digest: str) -> None:
        """Accept only this content (``AdapterInfo.digest``) under a name that is known, until the adapter is
        replaced or unloaded: if its files are read later and differ, its requests fail with AdapterChanged.
        Raises AdapterNotFound."""
        self._names.check_known(name)
        self._table.of(name).expect(digest)

    # Unloading

    async def unload(self, name: str, *, force: bool) -> None:
        async with self._loads_ended(name) as (known, was_loading):
            was_fetched = known.source is not None
            known.forget_source()
            known.expected = ""
            if not self._names.is_registered(name) and (was_fetched or was_loading):
                return  # it was never needed, or its load was ended: there is nothing to free
            entry = self._names.find(name)
            self._stepper.check_goes_on()
            self._names.mixes.forget(name, _now())
            self._residency.retire(entry, _now())
            if force:
                self._abort_all(entry)
            self._stepper.wake()
            await self._stepper.until(lambda: entry.uid not in self._residency.entries, name)

    @asynccontextmanager
    async def _loads_ended(self, name: str) -> AsyncIterator[tuple[AdapterName, bool]]:
        """Take the name's lock. Loads that are under way, or wait for the lock, fail. Also gives whether one
        was under way."""
        known = self._table.of(name)
        was_loading = known.loading
        known.unloads += 1
        self._stepper.ask_again(name)
        try:
            async with self._alone(name):
                yield known, was_loading
        finally:
            known.unloads -= 1
            self._table.tidy(known)

    def _abort_all(self, entry: AdapterEntry) -> None:
        for request in list(self._core.requests.values()):
            if request.adapter is not None and self._names.mixes.is_made_of(request.adapter, entry):
                self._core.end(request, "abort", _now())

    # Pinning

    async def pin(self, name: str, *, force: bool) -> AdapterInfo:
        return await self.load(name, None, pin=True, replace=False, force_pin=force)

    async def unpin(self, name: str) -> AdapterInfo:
        self._table.unpin(self._names.find(name), _now())
        self._stepper.wake()
        return self.info(name)

    # Common

    def all(self) -> list[AdapterInfo]:
        """Describe every registered adapter. Most of thousands are idle, and described once."""
        found, is_mix = [], self._names.mixes.is_mix
        for entry in self._residency.current.values():
            if is_mix(entry):
                continue
            if entry.location is not Location.DISK or entry.pinned or len(entry.waiting):
                found.append(adapter_info(entry))
                continue
            known = self._table.of(entry.label)
            info = known.described
            if info is None or (info.version, info.digest) != (entry.version, entry.digest):
                info = known.described = adapter_info(entry)
            found.append(info)
        for known in self._table.in_use.values():
            if known.source is not None and not self._names.is_registered(known.label):
                found.append(AdapterInfo(name=known.label, path=known.source))
        return found

    def count(self) -> int:
        """Return the number of registered adapters; a mix counts, too."""
        return sum(known.looked_up or known.current is not None for known in self._table.in_use.values())

    def busy(self) -> list[AdapterInfo]:
        """Return the registered adapters that hold memory, will soon hold it, or have requests that wait. The
        cost does not grow with the number of registered adapters."""
        core, current = self._core, self._residency.current
        entries = {entry.uid: entry for entry in core.cpu.entries.values()}
        entries |= {entry.uid: entry for entry in core.queues.heads.values() if entry is not None}
        return [
            adapter_info(entry)
            for entry in entries.values()
            if current.get(entry.label) is entry and not self._names.mixes.is_mix(entry)
        ]

    def resident(self) -> Sequence[AdapterInfo]:
        """Return the adapters that hold memory or will soon hold it."""
        return [adapter_info(entry) for entry in self._core.cpu.entries.values()]

    def find(self, name: str) -> AdapterInfo | None:
        """Return the adapter's present state; None if it is not registered."""
        entry = self._residency.current.get(name)
        if entry is not None:
            return None if self._names.mixes.is_mix(entry) else adapter_info(entry)
        path = self._names.source(name)
        return None if path is None else AdapterInfo(name=name, path=path)

    def replaced(self) -> Sequence[AdapterInfo]:
        """Return the replaced versions that requests still need, wherever they are. Mixes are left out."""
        return [
            adapter_info(entry) for entry in self._residency.replaced() if not self._names.mixes.is_mix(entry)
        ]

    def info(self, name: str) -> AdapterInfo:
        """Return the adapter's present state. Raises AdapterNotFound."""
        path = self._names.source(name)
        if path is not None and not self._names.is_registered(name):
            return AdapterInfo(name=name, path=path)
        return adapter_info(self._names.find(name))

    def close(self, error: AioEngineError) -> None:
        """Stop all look-ups; callers that wait for one get ``error``."""
        self._names.lookups.close(error)


def _found_at(known: AdapterName, source: str | None) -> None:
    """Note the path that the current version was given by, if any."""
    if source is not None:
        known.forget_source()
        if is_source(source):
            known.look_up(source)


def _now() -> float:
    return asyncio.get_running_loop().time()
