"""The adapters' life cycle as callers see it: register, load, replace, pin, unload."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from aioengine import events
from aioengine.core.state import AdapterEntry, location_name
from aioengine.errors import AdapterInvalid, AdapterNotFound, AioEngineError, ConfigError
from aioengine.info import AdapterInfo
from aioengine.schedulers.policy import Location
from aioengine.stepper import Stepper

NAME_RULE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/+\-]{0,254}")


class AdapterOps:
    """All methods run on the event loop; those that wait can be cancelled at any point."""

    def __init__(self, stepper: Stepper, max_loras: int) -> None:
        self._stepper = stepper
        self._core = stepper.core
        self._residency = stepper.core.residency
        self._max_loras = max_loras
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}

    def find(self, name: str) -> AdapterEntry:
        """The current version. Raises AdapterNotFound."""
        entry = self._residency.current.get(name)
        if entry is None:
            known = ", ".join(sorted(self._residency.current)[:20]) or "none"
            raise AdapterNotFound(
                f"not registered; load it with load_adapter or register_adapter (known: {known})",
                name=name,
            )
        return entry

    def register(self, name: str, path: str | os.PathLike[str]) -> AdapterInfo:
        where = self._checked(name, path)
        current = self._residency.current.get(name)
        if current is not None:
            self._same_path(current, where)
            return adapter_info(current)
        entry = self._residency.declare(name, where)
        self._residency.publish(entry, self._now())
        self._stepper.wake()
        return adapter_info(entry)

    async def load(
        self, name: str, path: str | os.PathLike[str] | None, *, pin: bool, replace: bool
    ) -> AdapterInfo:
        async with self._lock(name):
            current = self._residency.current.get(name)
            where = self.find(name).path if path is None else self._checked(name, path)
            if current is not None and not replace:
                self._same_path(current, where)
                entry = current
            else:
                entry = self._residency.declare(name, where)
            if pin:
                self._check_pin(entry, replaces=current)
            if entry.location is not Location.CPU and entry.location is not Location.SLOT:
                await self._load(entry, pin=pin)
            elif pin:
                entry.pinned = True
            self._stepper.wake()
            return adapter_info(entry)

    async def _load(self, entry: AdapterEntry, *, pin: bool) -> None:
        """Read it; publish it if it is a new version that turns out to be good."""
        new = self._residency.current.get(entry.label) is not entry
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def loaded(error: AioEngineError | None) -> None:
            if new and (error is not None or done.cancelled()):
                self._residency.retire(entry, self._now())
            elif new:
                self._residency.publish(entry, self._now())
            if error is None and not done.cancelled():
                entry.pinned = entry.pinned or pin
            if done.cancelled():
                return
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)

        assert entry.uid not in self._stepper.loaded, "the lock by name lets one load at a time wait"
        self._stepper.loaded[entry.uid] = loaded
        self._residency.want(entry, self._now())
        self._stepper.wake()
        try:
            await done
        except asyncio.CancelledError:
            if not new:  # whoever else needs it will have it; nobody asks for it by name any more
                self._stepper.loaded.pop(entry.uid, None)
                self._residency.forget_want(entry)
            elif entry.location is Location.DISK:  # not begun: nothing will call back
                self._stepper.loaded.pop(entry.uid, None)
                self._residency.retire(entry, self._now())
                self._stepper.wake()
            raise

    async def unload(self, name: str, *, force: bool) -> None:
        async with self._lock(name):
            entry = self.find(name)
            gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()

            def listen(event: events.Event) -> None:
                if (
                    isinstance(event, events.AdapterUnloaded)
                    and (event.adapter, event.version) == (entry.label, entry.version)
                    and not gone.done()
                ):
                    gone.set_result(None)

            self._stepper.listeners.append(listen)
            try:
                self._residency.retire(entry, self._now())
                if force:
                    self._abort_all(entry)
                self._stepper.wake()
                await gone
            finally:
                self._stepper.listeners.remove(listen)

    def _abort_all(self, entry: AdapterEntry) -> None:
        for request in list(self._core.requests.values()):
            if request.adapter is entry:
                self._core.end(request, "abort", self._now())

    async def pin(self, name: str) -> AdapterInfo:
        entry = self.find(name)
        self._check_pin(entry, replaces=entry)
        if entry.location in (Location.DISK, Location.LOADING):
            return await self.load(name, None, pin=True, replace=False)
        entry.pinned = True
        self._stepper.wake()
        return adapter_info(entry)

    async def unpin(self, name: str) -> AdapterInfo:
        entry = self.find(name)
        entry.pinned = False
        self._stepper.wake()
        return adapter_info(entry)

    def list(self) -> list[AdapterInfo]:
        return [adapter_info(entry) for entry in self._residency.current.values()]

    def _check_pin(self, entry: AdapterEntry, replaces: AdapterEntry | None) -> None:
        others = [
            e.label
            for e in self._residency.current.values()
            if e.pinned and e is not entry and e is not replaces
        ]
        if len(others) + 1 >= self._max_loras:
            raise ConfigError(
                f"adapter {entry.label!r} cannot be pinned: {len(others)} of max_loras="
                f"{self._max_loras} slots are pinned already ({', '.join(others) or 'none'}) and one "
                "must stay free for the others; unpin one or raise max_loras"
            )

    @staticmethod
    def _checked(name: str, path: str | os.PathLike[str]) -> str:
        try:
            where = os.fspath(path)
        except TypeError:
            where = None
        if not isinstance(where, str) or not where or "\0" in where:
            raise AdapterInvalid(
                f"path={path!r}: must be a folder's path, as str or os.PathLike", name=str(name)
            )
        if not isinstance(name, str) or NAME_RULE.fullmatch(name) is None:
            raise AdapterInvalid(
                "a name is 1 to 255 letters, digits and _ . : / + - and starts with a letter, digit or _",
                name=str(name),
                path=where,
            )
        return os.path.abspath(os.path.expanduser(where))

    @staticmethod
    def _same_path(current: AdapterEntry, path: str) -> None:
        if current.path != path:
            raise AdapterInvalid(
                f"already registered from {current.path}; pass replace=True to load_adapter to put a "
                "new version in its place, or unload_adapter first",
                name=current.label,
                path=path,
            )

    def _lock(self, name: str) -> AbstractAsyncContextManager[None]:
        """One life-cycle operation that waits at a time for each name."""
        return _counted_lock(self._locks, name)

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


@asynccontextmanager
async def _counted_lock(locks: dict[str, tuple[asyncio.Lock, int]], name: str) -> AsyncIterator[None]:
    """A lock by name that exists only while somebody holds it or waits for it."""
    lock, users = locks.get(name, (asyncio.Lock(), 0))
    locks[name] = (lock, users + 1)
    try:
        async with lock:
            yield
    finally:
        lock, users = locks[name]
        if users == 1:
            del locks[name]
        else:
            locks[name] = (lock, users - 1)


def adapter_info(entry: AdapterEntry) -> AdapterInfo:
    return AdapterInfo(
        name=entry.label,
        version=entry.version,
        path=entry.path,
        rank=entry.rank,
        bytes=entry.nbytes,
        location=location_name(entry),
        slot=entry.slot if entry.location is Location.SLOT else None,
        pinned=entry.pinned,
        running=entry.running,
        waiting=len(entry.waiting),
    )
