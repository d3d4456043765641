"""AdapterOps: the adapters' life cycle as callers see it: register, load, replace, pin, unload."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

from aioengine.adapters.peft.held import HeldAdapter, HeldAdapters, hold_files, hold_tensors, state_of
from aioengine.adapters.resolvers.sources import check_same_path, checked_path
from aioengine.core.adapters.name import AdapterName, NameTable
from aioengine.core.adapters.version import Life
from aioengine.core.state import AdapterEntry
from aioengine.errors import (
    AdapterInvalid,
    AdapterLoadError,
    AdapterNotFound,
    frameless,
)
from aioengine.info import AdapterInfo, is_mix
from aioengine.model.files.sources import is_source
from aioengine.runtime.sources.mixes import held_of, parts_of
from aioengine.runtime.submit import RequestOps
from aioengine.schedulers.policy import Location

if TYPE_CHECKING:
    from torch import Tensor

    from aioengine.step import BytesLike


class AdapterOps(RequestOps):
    """Adds an engine's operations on adapters; those that wait can be cancelled at any point."""

    _held: HeldAdapters

    @property
    def _table(self) -> NameTable:
        return self._core.residency.names

    # Registering and loading

    def register_adapter(self, name: str, path: str | os.PathLike[str]) -> AdapterInfo:
        """Declare an adapter that is read when a request first needs it. No I/O. ``path`` is a PEFT folder,
        "hf:owner/name[@revision]" (extra ``hub``), or a URL such as "s3://bucket/folder" (extra ``s3``).
        Raises AdapterInvalid for a bad name, or if the name stands for another path already."""
        self._check_lora()
        where = checked_path(name, path)
        known = self._table.of(name)
        registered = _registered_path(known)
        if registered is not None:
            check_same_path(name, registered, where)
        elif is_source(where):
            known.source = where
            self._table.keep(known)
        else:
            known.register(where, self._loop.now())
            self._loop.wake()
        return self._info(name)

    async def load_adapter(
        self,
        name: str,
        path: str | os.PathLike[str] | None = None,
        *,
        tensors: Mapping[str, Tensor] | None = None,
        config: object = None,
        pin: bool = False,
        replace: bool = False,
    ) -> AdapterInfo:
        """Read and validate an adapter and bring it to the CPU cache.

        ``path`` is as in :meth:`register_adapter`, and may be left out for a name that is registered or that
        the resolver has. ``tensors`` and ``config`` (a ``peft.LoraConfig``, or a dict of its fields) are an
        adapter in memory instead, as PEFT saves it. With ``replace`` it becomes the next version of this
        name, with its pin: accepted requests finish on the old version, which stays if the new one is not
        valid. With ``pin`` it goes to a slot, as by :meth:`pin_adapter`.

        Raises AdapterInvalid, AdapterTooLarge, AdapterLoadError; AdapterNotFound without ``path`` for
        an unknown name; ConfigError if ``pin`` would leave no slot for other adapters; EngineOverloaded if
        pinned adapters fill the CPU cache.
        """
        self._check_lora()
        if tensors is None and config is None:
            source = None if path is None else checked_path(name, path)
            return await self._load(name, source, pin=pin, replace=replace)
        if tensors is None or config is None or path is not None:
            raise AdapterInvalid("give either a path, or tensors and their config", name=str(name))
        hold = partial(hold_tensors, tensors=tensors, config=config)
        return await self._load_copy(name, hold, pin=pin, replace=replace)

    async def load_adapter_state(
        self,
        name: str,
        model: object,
        *,
        adapter_name: str | None = None,
        pin: bool = False,
        replace: bool = True,
    ) -> AdapterInfo:
        """Load the present state of a live ``peft.PeftModel``'s adapter, by default the active one, as
        :meth:`load_adapter` does with tensors. Raises AdapterInvalid for another object."""
        tensors, config = state_of(model, adapter_name, name)
        return await self.load_adapter(name, tensors=tensors, config=config, pin=pin, replace=replace)

    async def load_adapter_files(
        self, name: str, config: bytes, weights: BytesLike, *, pin: bool = False, replace: bool = False
    ) -> AdapterInfo:
        """Load an adapter from the content of its two files, as :meth:`load_adapter` does with tensors."""
        self._check_lora()
        hold = partial(hold_files, config=config, weights=memoryview(weights))
        return await self._load_copy(name, hold, pin=pin, replace=replace)

    async def _load_copy(
        self, name: str, hold: Callable[..., HeldAdapter], *, pin: bool, replace: bool
    ) -> AdapterInfo:
        """Copy an adapter that is given in memory, and load the copy."""
        held = await self._held.copy(name, hold)
        try:
            return await self._load(name, held, pin=pin, replace=replace)
        except BaseException:
            if all(entry.files is not held for entry in self._core.residency.entries.values()):
                held.release()  # at once, and not when the last reference to the error goes
            raise

    async def _load(
        self,
        name: str,
        source: str | HeldAdapter | None,
        *,
        pin: bool = False,
        replace: bool = False,
        force_pin: bool = False,
    ) -> AdapterInfo:
        """Load an adapter from a checked path, or from memory; None: from where it is registered."""
        if pin and source is None:
            self._names.find(name)  # or else its pin may be refused first
        with ExitStack() as stack:
            if pin:
                stack.callback(self._loop.wake)  # it may be unpinned again
                stack.enter_context(self._table.of(name).claim(force=force_pin, clock=self._loop.now))
            async with self._loading(name) as known:
                registered = _registered_path(known)
                if source is not None and registered is not None and not replace:
                    check_same_path(name, registered, source if isinstance(source, str) else source.path)
                    source = None  # it is the registered path
                if source is None and not (replace and known.current):
                    entry = await self._names.acquire(name)
                else:
                    entry = await self._new_version(known, source)
                await self._read(entry, known)
                if entry.life is Life.NEW:
                    known.replace(entry, self._loop.now())
                if pin:
                    known.pin(self._loop.now())
                    known.load(self._loop.now())  # it may have left the cache again
                self._loop.wake()
            if pin:
                await self._loop.until(lambda: self._is_in_slot(name), name)
        return self._info(name)

    @asynccontextmanager
    async def _loading(self, name: str) -> AsyncIterator[AdapterName]:
        """Take the name's lock to look up or read a version. An unload does not wait for that, which may
        hang: it ends it, with AdapterLoadError, also for those who wait for the lock."""
        unloaded = AdapterLoadError("it was unloaded while it was being loaded", name=name)
        known = self._table.of(name)
        async with self._names.lock(known):
            if known.unloads:
                raise unloaded
            try:
                async with asyncio.timeout(None) as limit:
                    known.stop_load = lambda: None if limit.expired() else limit.reschedule(0.0)
                    yield known
            except TimeoutError:
                if not limit.expired():
                    raise
                raise unloaded from None
            finally:
                known.stop_load = None

    async def _new_version(self, known: AdapterName, source: str | HeldAdapter | None) -> AdapterEntry:
        """Declare a version without publishing it. With ``source`` None it comes from the registered path,
        looked up again if necessary."""
        if isinstance(source, HeldAdapter):
            return known.declare(source.path, files=source)
        source = known.source if source is None else source
        if source is None:
            current = known.resolve()
            return known.declare(current.path, files=held_of(current))
        if source and not is_source(source):
            return known.declare(source)
        where = await self._names.lookups.locate(known.label, source)
        return known.declare(where, source=source)

    async def _read(self, entry: AdapterEntry, known: AdapterName) -> None:
        """Have a version read. If that fails, a new one goes."""
        try:
            await self._names.read(entry, now=True)
        except BaseException:
            if known.current is not entry and not entry.retired:
                known.retire(entry, self._loop.now())
                self._loop.wake()
            raise

    # Replacing in two steps, for those who change several engines, or several adapters, all or none

    async def prepare_adapter(
        self, name: str, path: str | os.PathLike[str] | None = None, *, read: bool = True
    ) -> AdapterInfo:
        """Make the next version of an adapter ready for :meth:`commit_adapter`, which may be at the same time
        as that of other engines. With ``read=False`` it is read when a request first needs it."""
        self._check_lora()
        source = None if path is None else checked_path(name, path)
        async with self._loading(name) as known:
            self.discard_adapter(name)
            entry = await self._new_version(known, source)
            if read:
                await self._read(entry, known)
            known.prepared = entry
            self._table.keep(known)
        return entry.info

    def commit_adapter(self, name: str) -> AdapterInfo:
        """Let new requests use the prepared version. Raises AdapterNotFound if there is none."""
        self._check_lora()
        known = self._table.of(name)
        entry = known.take_prepared()
        if entry is None:
            raise AdapterNotFound("no version of it was prepared; call prepare_adapter first", name=name)
        known.replace(entry, self._loop.now())
        self._loop.wake()
        return self._info(name)

    def discard_adapter(self, name: str) -> None:
        """Drop the prepared version, if there is one."""
        self._check_lora()
        known = self._table.of(name)
        entry = known.take_prepared()
        if entry is not None:
            known.retire(entry, self._loop.now())
            self._loop.wake()

    def expect_adapter(self, name: str, digest: str) -> None:
        """Accept only this content (``AdapterInfo.digest``) under a known name, until it is replaced or
        unloaded: if its files differ later, its requests fail with AdapterChanged. Raises AdapterNotFound."""
        self._check_lora()
        self._names.find(name)
        self._table.of(name).expect(digest)

    # Unloading

    async def unload_adapter(self, name: str, *, force: bool = False) -> None:
        """Accept no new requests for the adapter, wait for the accepted ones (with ``force``: abort them),
        and free its memory, also if the call is cancelled. Loads of it that are under way fail. Raises
        AdapterNotFound."""
        self._check_lora()
        known = self._table.of(name)
        was_loading = known.stop_load is not None
        known.unloads += 1
        if known.stop_load is not None:
            known.stop_load()
        try:
            async with self._names.lock(known):
                entry, was_fetched = known.current, bool(known.source)
                if entry is not None:
                    self._loop.check_goes_on()
                    self._mixes.forget(name, self._loop.now())
                known.unload(self._loop.now())
                if entry is None:
                    if was_fetched or was_loading:
                        return  # it was never needed, or its load was ended: there is nothing to free
                    raise self._table.not_found(name)
                if force:
                    for request in list(self._core.requests.values()):
                        if request.adapter is not None and entry in parts_of(request.adapter):
                            self._loop.abort(request)
                self._loop.wake()
                await self._loop.until(lambda: entry.uid not in self._core.residency.entries, name)
        finally:
            known.unloads -= 1

    # Pinning

    async def pin_adapter(self, name: str, *, force: bool = False) -> AdapterInfo:
        """Bring an adapter to a slot and keep it there; returns when it is in its slot. At most
        ``max_loras - 1`` can be pinned; with ``force`` all slots, and then requests for other adapters fail
        with EngineOverloaded. Raises AdapterNotFound, ConfigError, or what loading it raises."""
        self._check_lora()
        return await self._load(name, None, pin=True, force_pin=force)

    async def unpin_adapter(self, name: str) -> AdapterInfo:
        """Remove a pin. Raises AdapterNotFound."""
        self._check_lora()
        self._table.of(name).unpin(self._loop.now())
        self._loop.wake()
        return self._info(name)

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

    # What there is

    def adapters(self) -> list[AdapterInfo]:
        """Return the state of every registered adapter."""
        found = map(self._describe, self._table.in_use.values())
        return [info for info in found if info is not None]

    def _describe(self, known: AdapterName) -> AdapterInfo | None:
        if known.current is not None:
            return None if is_mix(known.label) else known.current.info
        return AdapterEntry(0, known.label, 0, known.source).info if known.source else None

    def count_adapters(self) -> int:
        """Return about how many adapters are registered: mixes count, too."""
        return sum(known.is_known for known in self._table.in_use.values())

    def _busy(self) -> list[AdapterInfo]:
        """Return the registered adapters that hold memory, will soon, or have requests that wait."""
        waited_for = [entry for entry in self._core.queues.heads.values() if entry is not None]
        entries = dict.fromkeys([*self._core.cpu.entries.values(), *waited_for])
        return [e.info for e in entries if e.life is Life.CURRENT and not is_mix(e.label)]

    def resident(self) -> list[AdapterInfo]:
        """Return the versions in slots, in the CPU cache, and on their way to it, mixes included."""
        return [entry.info for entry in self._core.cpu.entries.values()]

    def replaced(self) -> list[AdapterInfo]:
        """Return the replaced versions that requests still wait for or run on, wherever they are."""
        return [entry.info for entry in self._core.residency.replaced() if not is_mix(entry.label)]

    def find_adapter(self, name: str) -> AdapterInfo | None:
        """Return the state of one adapter; None if it is not registered."""
        return self._describe(self._table.of(name))

    def _info(self, name: str) -> AdapterInfo:
        """Return the adapter's present state. Raises AdapterNotFound."""
        return self.find_adapter(name) or self._table.of(name).resolve().info


def _registered_path(known: AdapterName) -> str | None:
    """Return the path as it was given; None if the name is free."""
    return known.source or (None if known.current is None else known.current.path)
