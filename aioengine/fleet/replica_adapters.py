"""The adapters of a replica, as gateways change them for the whole fleet."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from typing import Any

from aioengine.engine import AsyncEngine
from aioengine.errors import AdapterLoadError, AdapterNotFound
from aioengine.fleet.registry import Entry
from aioengine.fleet.wire import gone
from aioengine.info import AdapterInfo, scaled_digest, without_versions
from aioengine.tasks import Background

ChangeId = tuple[int, str]
"""Version that a change replaces, and the gateway that makes it."""
MAX_LEFT = 10_000
"""Unloaded adapters that are remembered, because what was said of them before may come late."""


class ReplicaAdapters:
    """What gateways ask of a replica's engine. ``configured``: names that it knows from its start."""

    def __init__(self, engine: AsyncEngine, configured: Iterable[str]) -> None:
        self._engine = engine
        self._configured = frozenset(configured)
        self._told = dict.fromkeys(self._configured, 0)
        """The fleet's version of each adapter that this replica was told of; 0: it has none yet. The engine
        counts its own."""
        self._left: dict[str, int] = {}
        """The fleet's version of adapters that were unloaded since, of the last ``MAX_LEFT``."""
        self._changes: dict[str, ChangeId] = {}
        """By adapter: the change that prepares a version, or has prepared it. The highest may go on."""
        self._unloads = Background()

    async def call(self, action: str, arguments: dict[str, Any]) -> Any:
        """Do what a gateway asks for."""
        calls: dict[str, Callable[..., Awaitable[Any]]] = {
            "load": self._engine.load_adapter,
            "unload": self._unload,
            "pin": self._engine.pin_adapter,
            "unpin": self._engine.unpin_adapter,
            "prepare": self._prepare,
            "settle": self._settle,
            "sync": self._sync,
            "forget": self._forget,
        }
        return await calls[action](**arguments)

    def holding(self, adapter: str, content: str, scale: float | None = None) -> str:
        """Return what the engine calls the version of an adapter that has this content, times ``scale`` if
        there is one: the current one for "", and if that has not been read yet. Raises AdapterNotFound."""
        name = without_versions(adapter)
        current = self._engine.find_adapter(name)
        for info in (current, *self._engine.replaced()) if content else ():
            if info is not None and info.name == name:
                digest = info.digest if scale is None else scaled_digest(info.digest, scale)
                if digest == content:
                    return name if info is current else f"{name}@{info.version}"
        if content and current is not None and current.digest:
            raise gone(adapter)
        return name

    # Preparing: each prepared version belongs to one gateway's change, and no other one uses or drops it

    async def _prepare(
        self, name: str, change: ChangeId, path: str | None = None, read: bool = True
    ) -> AdapterInfo:
        """Prepare a version. Nothing of it stays if the change ends meanwhile, or a later one has begun."""
        if change[0] < self._told.get(name, 0) or change < self._changes.get(name, change):
            raise _ended(name)
        self._changes[name] = change
        try:
            info = await self._engine.prepare_adapter(name, path, read=read)
            if self._changes.get(name) != change:
                self._engine.discard_adapter(name)
                raise _ended(name)
            return info
        except BaseException:
            self._end(name, change)
            raise

    async def _settle(self, name: str, change: ChangeId, entry: Entry | None, unpin: bool) -> None:
        """End a change that has failed, and be as the registry has it: ``entry``, None if it has none."""
        self._discard(name, change)
        if unpin:
            with suppress(AdapterNotFound):
                await self._engine.unpin_adapter(name)
        if entry is not None:
            await self._sync([entry])

    def _discard(self, name: str, change: ChangeId | None) -> None:
        """End the change: drop what it has prepared, or prepares."""
        if self._end(name, change):
            self._engine.discard_adapter(name)

    def _end(self, name: str, change: ChangeId | None) -> bool:
        """Return whether the change had not ended."""
        if change is None or self._changes.get(name) != change:
            return False
        del self._changes[name]
        return True

    # Telling

    async def _unload(self, name: str, version: int, force: bool) -> None:
        if self._leave(name, version):
            await self._engine.unload_adapter(name, force=force)

    async def _forget(self, name: str, version: int) -> None:
        """Unload an adapter in the background: requests that run on it may take long to finish."""

        async def unload() -> None:
            with suppress(AdapterNotFound):
                await self._engine.unload_adapter(name)

        if self._leave(name, version):
            self._unloads.spawn(unload(), f"aioengine-unload-{name}")
            await asyncio.sleep(0)  # it begins, and from then on requests are refused

    def _leave(self, name: str, version: int) -> bool:
        """Note that a version is unloaded. Returns whether it has not been replaced meanwhile."""
        if self._told.get(name, 0) > version:
            return False
        self._told.pop(name, None)
        if version:
            self._left[name] = version
            if len(self._left) > MAX_LEFT:
                del self._left[next(iter(self._left))]
        return True

    async def _sync(
        self, entries: list[Entry], change: ChangeId | None = None, whole: bool = False
    ) -> dict[str, int]:
        """Know the registry's adapters, with the content that each has there, which ``change`` may have
        prepared; then new requests use it from now on. If these are the ``whole`` registry, returns what the
        replica was told of beside them, with versions."""
        for entry in entries:
            name, told = entry.name, self._told.get(entry.name, 0)
            if entry.version < told or 0 < entry.version <= self._left.get(name, 0):
                self._discard(name, change)
                continue  # it comes late
            if entry.version:
                self._told[name] = entry.version  # at once: it may be unloaded while this waits
            there = self._engine.find_adapter(name)
            has_it = there is not None and entry.digest in {there.digest} - {""}
            if self._end(name, change):
                self._engine.commit_adapter(name)
            elif told < entry.version and not has_it:
                await self._engine.prepare_adapter(name, entry.path, read=False)
                self._engine.commit_adapter(name)
            if entry.digest:
                self._engine.expect_adapter(name, entry.digest)
            if entry.pinned:
                await self._engine.pin_adapter(name)
        others = self._told.keys() - self._configured - {entry.name for entry in entries} if whole else ()
        return {name: self._told[name] for name in others}

    async def stop(self) -> None:
        await self._unloads.end()


def _ended(name: str) -> AdapterLoadError:
    why = "the gateway that changes it has given that up, or another one changes it; repeat the change"
    return AdapterLoadError(why, name=name, transient=True)
