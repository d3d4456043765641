"""Uploads: adapters that a gateway has received, in a folder that every replica reads."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import time
import uuid
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING

from aioengine.errors import AdapterConflict, AdapterInvalid, AdapterLoadError, ConfigError
from aioengine.fleet.registry import write_file
from aioengine.model.files.hub import is_source
from aioengine.model.files.remote import check_protocol, why_failed
from aioengine.step import BytesLike
from aioengine.tasks import end_tasks, run_to_completion

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

logger = logging.getLogger("aioengine.fleet")

KEEP_SECONDS = 3600.0
"""How long an upload that no adapter is loaded from is kept since it was first seen so, or was seen to be
written again: requests may still need the version that was replaced. It is this gateway's own time, because a
store's clock may be another one, and a system's clock may be set."""


class Uploads:
    """Uploads below the registry's folder, in a folder each that is named by the SHA-256 of its files."""

    def __init__(self, registry: str | None) -> None:
        self.alone: Callable[[str], AbstractAsyncContextManager[object]] = NameLocks().hold
        """Function that makes a context for a name in which no other caller is; a fleet's gateway gives one
        in which no other gateway is, either, and which learns first what they have changed."""
        self._root: str | None = None
        if registry is not None:
            place = registry if is_source(registry) else os.path.abspath(os.path.expanduser(registry))
            self._root = f"{place.rstrip('/')}/uploads"
        self._removing = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._due = False
        """Whether the task is to look for what is not in use (once more)."""
        self._unused: dict[str, tuple[float, float | None]] = {}
        """By the folder of an upload that is not in use: when this gateway has first seen that, and when the
        store says that its last file was written."""

    @asynccontextmanager
    async def stored(
        self, name: str, config: bytes, weights: BytesLike, used: Callable[[], Collection[str]]
    ) -> AsyncIterator[str]:
        """Write an adapter's files, and give their folder, which no gateway removes while it is loaded in the
        block. ``used`` returns the folders that adapters are loaded from. What is invalid is removed at once,
        because nobody can load it; what else has not been in use for long, in the background, until
        :meth:`stop`, because a store with many folders is slow.

        Raises ConfigError without a registry, and AdapterLoadError if they cannot be written."""
        root = self._root
        if root is None:
            raise ConfigError(
                f"adapter {name!r}: a fleet keeps uploads below its registry, so that every replica can read "
                "them: set registry (--registry) to a folder or URL that gateways and replicas share, or "
                "load the adapter from such a folder"
            )
        digest = await asyncio.to_thread(_digest, config, weights)
        folder = f"{root}/{digest}"
        try:
            async with self.held(folder, name):
                await asyncio.to_thread(_store, root, folder, name, config, weights)
                try:
                    yield folder
                except AdapterConflict:  # others may need good files, such as those of an earlier version
                    raise
                except AdapterInvalid:
                    await self._remove_invalid(root, digest, used)
                    raise
                finally:
                    self.in_use(folder)
        finally:
            self._due = True
            if self._task is None or self._task.done():
                self._task = asyncio.get_running_loop().create_task(self._remove_while_due(used))

    @asynccontextmanager
    async def held(self, path: str | os.PathLike[str] | None, name: str) -> AsyncIterator[None]:
        """Load ``name`` from ``path`` in the block: if an upload is there, no gateway removes it meanwhile.
        Raises AdapterLoadError."""
        where = "" if path is None else os.fspath(path)
        if self._root is None or not where.startswith(f"{self._root}/"):
            yield
            return
        right = f"upload*{_name(where)}"  # no adapter has such a name
        try:
            async with self.alone(right):
                yield
        except AdapterLoadError as error:
            if error.name != right:
                raise
            raise AdapterLoadError(error.reason, name=name, path=where, transient=error.transient) from error

    async def _remove_invalid(self, root: str, name: str, used: Callable[[], Collection[str]]) -> None:
        if name in map(_name, used()):
            return
        try:
            await run_to_completion(asyncio.to_thread(_remove, root, name))
        except Exception as error:  # each filesystem raises its own types
            logger.warning("an upload that is not valid was not removed: %s", error)

    async def stop(self) -> None:
        if self._task is not None:
            await end_tasks([self._task])

    def in_use(self, folder: str) -> None:
        """Note that an adapter is loaded from a folder, if only for a moment."""
        self._unused.pop(_name(folder), None)

    async def _remove_while_due(self, used: Callable[[], Collection[str]]) -> None:
        while self._due:  # again for those that have ended meanwhile, but once for all of them
            self._due = False
            await self.remove_unused(used)

    async def remove_unused(self, used: Callable[[], Collection[str]]) -> None:
        """Remove what has not been among the folders that ``used`` returns for ``KEEP_SECONDS``."""
        root = self._root
        if root is None:
            return
        try:
            async with self._removing:
                written = await asyncio.to_thread(_written, root)
                for name in self._to_remove(written, set(map(_name, used()))):
                    async with self.held(f"{root}/{name}", name):
                        # It may have been written again, or used, since it was listed.
                        at = await asyncio.to_thread(_written_at, root, name)
                        if at == written[name] and name in self._unused and name not in map(_name, used()):
                            await run_to_completion(asyncio.to_thread(_remove, root, name))
                            self._unused.pop(name, None)
        except Exception as error:  # each filesystem raises its own types
            logger.warning("uploads that no adapter is loaded from were not removed: %s", error)

    def _to_remove(self, written: Mapping[str, float | None], wanted: Collection[str]) -> list[str]:
        now, removed = time.monotonic(), list[str]()
        before, self._unused = self._unused, {}
        for name in written.keys() - wanted:
            at = written[name]
            since, was_written = before.get(name, (now, at))
            if at is None or at != was_written:  # without files, it is about to be written
                since = now
            self._unused[name] = since, at
            if now - since > KEEP_SECONDS:
                removed.append(name)
        return removed


def _written(root: str) -> dict[str, float | None]:
    """Return when the last file of each upload was written, as the store says; None: it has no files."""
    import fsspec

    system, path = fsspec.core.url_to_fs(root)
    system.invalidate_cache()  # other gateways write here, too
    found: dict[str, float | None] = {}
    for folder in system.ls(path, detail=False):
        found[_name(folder)] = _newest(system, folder)
    return found


def _written_at(root: str, name: str) -> float | None:
    """Return the same for one upload, as it is now."""
    import fsspec

    system, path = fsspec.core.url_to_fs(root)
    system.invalidate_cache()
    return _newest(system, f"{path}/{name}")


def _newest(system: AbstractFileSystem, folder: str) -> float | None:
    try:
        files = system.ls(folder, detail=False)
        return max((system.modified(file).timestamp() for file in files), default=None)
    except FileNotFoundError:  # it was removed meanwhile
        return None


def _remove(root: str, name: str) -> None:
    import fsspec

    system, path = fsspec.core.url_to_fs(root)
    system.rm(f"{path}/{name}", recursive=True)


def _name(folder: str) -> str:
    """Return the last part, which says what is in it, wherever a gateway or a replica has the root."""
    return folder.rstrip("/").rpartition("/")[2]


def _store(root: str, folder: str, name: str, config: bytes, weights: BytesLike) -> None:
    part = f".{uuid.uuid4().hex}"  # another gateway may be given the same
    try:
        check_protocol(root, "registry")
        write_file(f"{folder}/adapter_config.json", config, part=part)
        write_file(f"{folder}/adapter_model.safetensors", bytes(weights), part=part)
    except ConfigError:
        raise
    except Exception as error:  # each filesystem raises its own types
        why = f"the upload cannot be stored: {why_failed(error)[0]}"
        raise AdapterLoadError(why, name=name, path=folder) from None


def _digest(config: bytes, weights: BytesLike) -> str:
    sha = hashlib.sha256(config)
    sha.update(weights)
    return sha.hexdigest()


class NameLocks:
    """A lock for each name, that exists only while somebody holds it or waits for it."""

    def __init__(self) -> None:
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}

    @asynccontextmanager
    async def hold(self, name: str) -> AsyncIterator[None]:
        lock, users = self._locks.get(name, (asyncio.Lock(), 0))
        self._locks[name] = (lock, users + 1)
        try:
            async with lock:
                yield
        finally:
            lock, users = self._locks[name]
            if users == 1:
                del self._locks[name]
            else:
                self._locks[name] = (lock, users - 1)
