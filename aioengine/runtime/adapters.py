"""The adapters' life cycle as callers see it: register, load, replace, pin, unload."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, nullcontext
from itertools import islice

from aioengine import events
from aioengine.adapters.names import NAME_RULE, check_same_path, checked_path
from aioengine.adapters.resolvers.base import AdapterResolver
from aioengine.core.state import AdapterEntry, location_name
from aioengine.errors import (
    AdapterInvalid,
    AdapterLoadError,
    AdapterNotFound,
    AioEngineError,
    EngineOverloaded,
)
from aioengine.info import AdapterInfo
from aioengine.model.files.hub import PREFIX
from aioengine.runtime.locks import NameLocks
from aioengine.runtime.lookup import Resolution
from aioengine.runtime.loop import Stepper
from aioengine.runtime.pins import Pins
from aioengine.runtime.transfers import log_failure
from aioengine.schedulers.policy import Location


class AdapterOps:
    """All methods run on the event loop; those that wait can be cancelled at any point."""

    def __init__(
        self,
        stepper: Stepper,
        max_loras: int,
        resolver: AdapterResolver | None = None,
        resolve_timeout: float | None = None,
    ) -> None:
        self._stepper = stepper
        self._core = stepper.core
        self._residency = stepper.core.residency
        self._resolution = Resolution(resolver, resolve_timeout, stepper.report)
        self._fetched: dict[str, str | None] = {}
        """Names whose folder had, or has, to be found: the "hf:" path, or None for the resolver's."""
        self._pins = Pins(stepper, max_loras)
        self._locks = NameLocks()
        self._loading: dict[str, asyncio.Timeout] = {}
        """What ends the load under way, by name."""
        self._unloads: Counter[str] = Counter()
        """Names that are waited for in order to unload them."""
        self._prepared: dict[str, tuple[AdapterEntry, str | None]] = {}
        """By name: the version that is to be committed, and the path that it was given by."""
        stepper.listeners.append(self._forget_lost)

    # Finding

    def is_registered(self, name: str) -> bool:
        return name in self._residency.current

    def find(self, name: str) -> AdapterEntry:
        """The current version. Raises AdapterNotFound."""
        entry = self._residency.current.get(name)
        if entry is None:
            raise self._not_found(name)
        return entry

    def check_known(self, name: str) -> None:
        """Raises AdapterNotFound for what is not registered and cannot be asked for."""
        if name in self._residency.current or name in self._fetched:
            return
        good = isinstance(name, str) and NAME_RULE.fullmatch(name) is not None
        if not good or not self._resolution.can_resolve(name):
            raise self._not_found(name)

    def check_worth_a_try(self, name: str) -> None:
        """Raises again, for a while, what an adapter failed with that has failed more than once in a row."""
        entry = self._residency.current.get(name)
        if entry is None or entry.location is Location.DISK:
            self._residency.failures.check(name, _now())

    async def acquire(self, name: str, tenant: str | None = None) -> AdapterEntry:
        """The current version; if there is none, what the resolver finds for ``tenant`` is registered.

        Raises what :meth:`Resolution.locate` raises.
        """
        entry = self._residency.current.get(name)
        if entry is not None:
            return entry
        self.check_known(name)
        source = self._fetched.get(name)
        try:
            where = await self._resolution.locate(name, source, tenant)
        except (AdapterInvalid, AdapterLoadError) as error:
            self._residency.failures.add(name, error, _now())
            log_failure(self._residency.failures, name, error)
            raise
        entry = self._residency.current.get(name)
        if entry is not None:  # another one who waited was first
            return entry
        if source is not None and self._fetched.get(name) != source:  # unloaded meanwhile
            raise self._not_found(name)
        self._fetched[name] = source
        return self._publish(name, where)

    def _forget_lost(self, event: events.Event) -> None:
        """What was found somewhere and cannot be read any more is looked for anew by the next request."""
        if not isinstance(event, events.AdapterFailed) or event.reason not in ("io", "invalid"):
            return
        entry = self._residency.current.get(event.adapter)
        if entry is None or entry.version != event.version or entry.pinned:
            return
        if event.adapter in self._fetched:
            self._residency.retire(entry, event.time)
            self._stepper.wake()

    def _not_found(self, name: str) -> AdapterNotFound:
        current = self._residency.current
        known = ", ".join(islice(current, 20)) or "none"
        more = f" and {len(current) - 20} more" if len(current) > 20 else ""
        return AdapterNotFound(
            f"not registered; load it with load_adapter or register_adapter (known: {known}{more})", name=name
        )

    # Registering

    def register(self, name: str, path: str | os.PathLike[str]) -> AdapterInfo:
        where = checked_path(name, path)
        known = self._registered_path(name)
        if known is not None:
            check_same_path(name, known, where)
        elif where.startswith(PREFIX):
            self._fetched[name] = where
        else:
            self._publish(name, where)
        return self.info(name)

    def _publish(self, name: str, where: str) -> AdapterEntry:
        entry = self._residency.declare(name, where)
        self._residency.publish(entry, _now())
        self._stepper.wake()
        return entry

    def _registered_path(self, name: str) -> str | None:
        """As it was given; None if the name is free."""
        entry = self._residency.current.get(name)
        return self._fetched.get(name) or (None if entry is None else entry.path)

    # Loading

    async def load(
        self,
        name: str,
        path: str | os.PathLike[str] | None,
        *,
        pin: bool,
        replace: bool,
        force_pin: bool = False,
    ) -> AdapterInfo:
        with self._pins.claim(name, force=force_pin) if pin else nullcontext():
            async with self._locks.hold(name), self._until_unloaded(name):
                await self._load_version(name, path, pin=pin, replace=replace)
            if pin:
                await self._pins.in_slot(name)
        return self.info(name)

    @asynccontextmanager
    async def _until_unloaded(self, name: str) -> AsyncIterator[None]:
        """An unload does not wait for loads, which may hang; they fail with AdapterLoadError."""
        unloaded = AdapterLoadError("it was unloaded while it was being loaded", name=name)
        if name in self._unloads:
            raise unloaded
        try:
            async with asyncio.timeout(None) as limit:
                self._loading[name] = limit
                yield
        except TimeoutError:
            if not limit.expired():
                raise
            raise unloaded from None
        finally:
            del self._loading[name]

    async def _load_version(
        self, name: str, path: str | os.PathLike[str] | None, *, pin: bool, replace: bool
    ) -> None:
        source = None if path is None else checked_path(name, path)
        known = self._registered_path(name)
        if source is not None and known is not None and not replace:
            check_same_path(name, known, source)
            source = None  # it is the registered one
        if source is None and not (replace and self.is_registered(name)):
            entry = await self.acquire(name)
        else:
            entry = await self._new_version(name, source)
        if entry.location is Location.DISK or entry.location is Location.LOADING:
            await self._load(entry, pin=pin)
            if source is not None:
                self._fetched.pop(name, None)
                if source.startswith(PREFIX):
                    self._fetched[name] = source
        elif pin:
            entry.pinned = True
        self._fail_loads_shut_out()
        self._stepper.wake()

    async def _new_version(self, name: str, source: str | None) -> AdapterEntry:
        """Not published; ``source`` None: from where the registered one is, looked up again if need be."""
        if source is None and name not in self._fetched:
            where = self.find(name).path
        elif source is not None and not source.startswith(PREFIX):
            where = source
        else:
            where = await self._resolution.locate(name, source or self._fetched[name])
        return self._residency.declare(name, where)

    # Replacing in two steps

    async def prepare(self, name: str, path: str | os.PathLike[str] | None, *, read: bool) -> AdapterInfo:
        source = None if path is None else checked_path(name, path)
        async with self._locks.hold(name), self._until_unloaded(name):
            self.discard(name)
            entry = await self._new_version(name, source)
            if read:
                await self._load(entry, pin=False, publish=False)
            self._prepared[name] = entry, source
        return adapter_info(entry)

    def commit(self, name: str) -> AdapterInfo:
        entry, source = self._prepared.pop(name, (None, None))
        if entry is None:
            raise AdapterNotFound("no version of it was prepared", name=name)
        old = self._residency.current.get(name)
        entry.pinned = old is not None and old.pinned
        self._residency.publish(entry, _now())
        if source is not None:
            self._fetched.pop(name, None)
            if source.startswith(PREFIX):
                self._fetched[name] = source
        self._stepper.wake()
        return self.info(name)

    def discard(self, name: str) -> None:
        entry, _ = self._prepared.pop(name, (None, None))
        if entry is not None:
            self._residency.retire(entry, _now())
            self._stepper.wake()

    async def _load(self, entry: AdapterEntry, *, pin: bool, publish: bool = True) -> None:
        """Read it; publish it if it is a new version that turns out to be good. It takes over the pin."""
        new = self._residency.current.get(entry.label) is not entry
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        try:
            self._stepper.check_goes_on()  # it may have ended while the name's lock was waited for
        except AioEngineError:
            if new:
                self._residency.retire(entry, _now())
            raise

        def loaded(error: AioEngineError | None) -> None:
            old = self._residency.current.get(entry.label)
            if new and (error is not None or done.cancelled()):
                self._residency.retire(entry, _now())
            elif new and publish:
                entry.pinned = old is not None and old.pinned
                self._residency.publish(entry, _now())
            if error is None and not done.cancelled():
                entry.pinned = entry.pinned or pin
            if done.done():
                return
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)

        assert entry.uid not in self._stepper.loaded, "the lock by name lets one load at a time wait"
        self._stepper.loaded[entry.uid] = loaded
        self._residency.want(entry, _now())
        self._fail_loads_shut_out()
        self._stepper.wake()
        try:
            await done
        except asyncio.CancelledError:
            if not new:  # whoever else needs it will have it; nobody asks for it by name any more
                self._stepper.loaded.pop(entry.uid, None)
                if not entry.pinned:  # what is pinned is read again after a loss of the device
                    self._residency.forget_want(entry)
            elif self._stepper.loaded.pop(entry.uid, None) is not None:
                self._residency.retire(entry, _now())
                self._stepper.give_up_load(entry)
                self._stepper.wake()
            raise

    def _fail_loads_shut_out(self) -> None:
        """When pinned adapters fill the CPU cache, nothing else will ever be read into it."""
        pinned = [entry.label for entry in self._core.cpu.entries.values() if entry.pinned]
        if len(pinned) < self._core.cpu.capacity:
            return
        for uid in list(self._stepper.loaded):
            entry = self._residency.entries[uid]
            if entry.location is Location.DISK:
                self._residency.forget_want(entry)
                self._stepper.loaded.pop(uid)(
                    EngineOverloaded(
                        f"adapter {entry.label!r} ({entry.path}) cannot be loaded, because pinned adapters "
                        f"fill the CPU cache ({', '.join(pinned)}); unpin one, or raise "
                        "LoRAConfig.max_cpu_loras"
                    )
                )

    # Unloading

    async def unload(self, name: str, *, force: bool) -> None:
        loading = self._loading.get(name)
        if loading is not None and not loading.expired():
            loading.reschedule(_now())
        async with self._loads_ended(name):
            was_fetched = self._fetched.pop(name, None) is not None
            if not self.is_registered(name) and (was_fetched or loading is not None):
                return  # never needed so far, or its load was ended: there is nothing to free
            entry = self.find(name)
            self._stepper.check_goes_on()
            gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()

            def listen(event: events.Event) -> None:
                if isinstance(event, events.RequestEnded) and not entry.waiting:
                    self._stepper.give_up_load(entry)  # its last reader is gone
                if (
                    isinstance(event, events.AdapterUnloaded)
                    and (event.adapter, event.version) == (entry.label, entry.version)
                    and not gone.done()
                ):
                    gone.set_result(None)

            self._stepper.listeners.append(listen)
            try:
                self._residency.retire(entry, _now())
                self._pins.changed(name)
                if force:
                    self._abort_all(entry)
                if not entry.waiting:
                    self._stepper.give_up_load(entry)
                self._stepper.wake()
                await gone
            finally:
                self._stepper.listeners.remove(listen)

    @asynccontextmanager
    async def _loads_ended(self, name: str) -> AsyncIterator[None]:
        """The name's lock; loads that wait for it, too, fail."""
        self._unloads[name] += 1
        try:
            async with self._locks.hold(name):
                yield
        finally:
            self._unloads[name] -= 1
            if not self._unloads[name]:
                del self._unloads[name]

    def _abort_all(self, entry: AdapterEntry) -> None:
        for request in list(self._core.requests.values()):
            if request.adapter is entry:
                self._core.end(request, "abort", _now())

    # Pinning

    async def pin(self, name: str, *, force: bool) -> AdapterInfo:
        return await self.load(name, None, pin=True, replace=False, force_pin=force)

    async def unpin(self, name: str) -> AdapterInfo:
        self.find(name).pinned = False
        self._pins.changed(name)
        self._stepper.wake()
        return self.info(name)

    # Common

    def list(self) -> list[AdapterInfo]:
        registered = [adapter_info(entry) for entry in self._residency.current.values()]
        return registered + [
            _not_fetched(name, path)
            for name, path in self._fetched.items()
            if path is not None and not self.is_registered(name)
        ]

    def resident(self) -> Sequence[AdapterInfo]:
        """Those that hold memory, or are about to."""
        return [adapter_info(entry) for entry in self._core.cpu.entries.values()]

    def info(self, name: str) -> AdapterInfo:
        """Raises AdapterNotFound."""
        path = self._fetched.get(name)
        if path is not None and not self.is_registered(name):
            return _not_fetched(name, path)
        return adapter_info(self.find(name))

    def close(self, error: AioEngineError) -> None:
        """The engine stops: nothing more is looked up, and whoever waits for that gets ``error``."""
        self._resolution.close(error)


def adapter_info(entry: AdapterEntry) -> AdapterInfo:
    return AdapterInfo(
        name=entry.label,
        version=entry.version,
        path=entry.path,
        rank=entry.rank,
        bytes=entry.nbytes,
        digest=entry.digest,
        location=location_name(entry),
        slot=entry.slot if entry.location is Location.SLOT else None,
        pinned=entry.pinned,
        running=entry.running,
        waiting=len(entry.waiting),
    )


def _not_fetched(name: str, path: str) -> AdapterInfo:
    """Declared, and nothing of it is here yet."""
    return AdapterInfo(
        name=name,
        version=0,
        path=path,
        rank=0,
        bytes=0,
        location="disk",
        slot=None,
        pinned=False,
        running=0,
        waiting=0,
    )


def _now() -> float:
    return asyncio.get_running_loop().time()
