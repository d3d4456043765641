"""The adapters of a replica, as gateways change them for the whole fleet."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from typing import Any

from aioengine.engine import AsyncEngine
from aioengine.errors import AdapterLoadError, AdapterNotFound
from aioengine.fleet.registry import Entry
from aioengine.fleet.versions import gone
from aioengine.info import AdapterInfo, without_versions
from aioengine.tasks import end_tasks


class ReplicaAdapters:
    """What gateways ask of a replica's engine. ``configured``: names that it knows from its start."""

    def __init__(self, engine: AsyncEngine, configured: Iterable[str]) -> None:
        self._engine = engine
        self._configured = frozenset(configured)
        self._told = dict.fromkeys(self._configured, 1)
        """The fleet's version of each adapter that this replica was told of. Its engine counts its own."""
        self._changes: dict[str, str] = {}
        """By adapter: the change that prepares a version, or has prepared it, by its name among those of all
        gateways. The last one that has begun is the one that may go on."""
        self._unloads: set[asyncio.Task[None]] = set()

    async def call(self, action: str, arguments: dict[str, Any]) -> Any:
        """Do what a gateway asks for."""
        calls: dict[str, Callable[..., Awaitable[Any]]] = {
            "load": self._engine.load_adapter,
            "unload": self._unload,
            "pin": self._engine.pin_adapter,
            "unpin": self._engine.unpin_adapter,
            "prepare": self._prepare,
            "commit": self._commit,
            "discard": self._discard,
            "sync": self._sync,
            "others": self._others,
            "forget": self._forget,
            "labels": self._labels,
        }
        return await calls[action](**arguments)

    def holding(self, adapter: str, digest: str) -> str:
        """Return what the engine calls the version of an adapter that has this content, or the current one
        for "", and if that has not been read yet. Raises AdapterNotFound."""
        name = without_versions(adapter)
        current = self._engine.find_adapter(name)
        if not digest or (current is not None and current.digest == digest):
            return name
        for info in self._engine.replaced():
            if (info.name, info.digest) == (name, digest):
                return f"{name}@{info.version}"
        if current is None or not current.digest:
            return name
        raise gone(adapter)

    async def _labels(self, name: str, content: str) -> int:
        return await self._engine.head_labels(self.holding(name, content))

    # Preparing: each prepared version belongs to one gateway's change, and no other one uses or drops it

    async def _prepare(
        self, name: str, change: str, path: str | None = None, read: bool = True
    ) -> AdapterInfo:
        """Prepare a version. Nothing of it stays if the change ends meanwhile."""
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

    async def _commit(self, name: str, change: str, digest: str, version: int | None) -> AdapterInfo:
        """Let new requests use what the change has prepared."""
        if not self._end(name, change):
            raise _ended(name)
        info = self._engine.commit_adapter(name)
        self._engine.expect_adapter(name, digest)
        if version is not None:
            self._told[name] = version
        return info

    async def _discard(self, name: str, change: str) -> None:
        """End the change: drop what it has prepared, or prepares."""
        if self._end(name, change):
            self._engine.discard_adapter(name)

    def _end(self, name: str, change: str) -> bool:
        """Return whether the change had not ended."""
        if self._changes.get(name) != change:
            return False
        del self._changes[name]
        return True

    # Telling

    async def _unload(self, name: str, force: bool) -> None:
        await self._engine.unload_adapter(name, force=force)
        self._told.pop(name, None)

    async def _sync(self, entries: list[Entry]) -> None:
        """Know the registry's adapters, with the content that each has there."""
        for entry in entries:
            there = self._engine.find_adapter(entry.name)
            has_it = there is not None and entry.digest in {there.digest} - {""}
            if self._told.get(entry.name, 0) < entry.version and not has_it:
                await self._engine.prepare_adapter(entry.name, entry.path, read=False)
                self._engine.commit_adapter(entry.name)
            self._told[entry.name] = entry.version
            if entry.digest:
                self._engine.expect_adapter(entry.name, entry.digest)
            if entry.pinned:
                await self._engine.pin_adapter(entry.name)

    async def _others(self, names: list[str]) -> list[str]:
        """Return the adapters that the replica was told of and that are not among these."""
        return list(self._told.keys() - self._configured - set(names))

    async def _forget(self, name: str) -> None:
        """Unload an adapter that the fleet has no more."""
        if name in self._told:
            del self._told[name]
            self._unload_soon(name)
            await asyncio.sleep(0)  # it begins, and from then on requests are refused

    def _unload_soon(self, name: str) -> None:
        """Unload an adapter; requests that run on it may take long to finish."""

        async def unload() -> None:
            with suppress(AdapterNotFound):
                await self._engine.unload_adapter(name)

        task = asyncio.get_running_loop().create_task(unload(), name=f"aioengine-unload-{name}")
        self._unloads.add(task)
        task.add_done_callback(self._unloads.discard)

    async def stop(self) -> None:
        await end_tasks(self._unloads)


def _ended(name: str) -> AdapterLoadError:
    why = "the gateway that changes it has given that up, or another one changes it; repeat the change"
    return AdapterLoadError(why, name=name, transient=True)
