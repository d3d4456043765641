"""Uploads: adapters that a gateway has received, in a folder that every replica reads."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import time
import uuid
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager

from aioengine.errors import AdapterInvalid, AdapterLoadError, ConfigError
from aioengine.fleet.registry import write_file
from aioengine.model.files.sources import check_protocol, is_source, why_failed
from aioengine.step import BytesLike
from aioengine.tasks import Background, run_to_completion

logger = logging.getLogger("aioengine.fleet")

KEEP_SECONDS = 3600.0
"""How long an upload that no adapter is loaded from is kept since this gateway has first seen it so: requests
may still need the version that was replaced. It is this gateway's own time, because a store's clock may be
another one, and a system's clock may be set."""


class Uploads:
    """Uploads below the registry's folder. The name of each one's folder begins with the SHA-256 of its
    files. ``used`` returns the folders that adapters are loaded from."""

    def __init__(self, registry: str | None, used: Callable[[], Collection[str]]) -> None:
        self._used = used
        self._root: str | None = None
        if registry is not None:
            place = registry if is_source(registry) else os.path.abspath(os.path.expanduser(registry))
            self._root = f"{place.rstrip('/')}/uploads"
        self._background = Background()
        self._unused: dict[str, float] = {}
        """When this gateway has first seen that an upload is not in use."""

    @asynccontextmanager
    async def stored(self, name: str, config: bytes, weights: BytesLike) -> AsyncIterator[str]:
        """Write an adapter's files, and give their folder: a new one, because others may just be removed,
        unless one with the same files is in use. What the block finds to be invalid is removed at once; what
        else has not been in use for long, in the background, until :meth:`stop`, because a store with many
        folders is slow.

        Raises ConfigError without a registry, and AdapterLoadError if they cannot be written."""
        if self._root is None:
            raise ConfigError(
                f"adapter {name!r}: a fleet keeps uploads below its registry, so that every replica can read "
                "them: set registry (--registry) to a folder or URL that gateways and replicas share, or "
                "load the adapter from such a folder"
            )
        digest = await asyncio.to_thread(_digest, config, weights)
        same = (there for there in map(_name, self._used()) if there.startswith(digest))
        folder = f"{self._root}/{next(same, f'{digest}-{uuid.uuid4().hex[:8]}')}"
        try:
            await asyncio.to_thread(_store, self._root, folder, name, config, weights)
            yield folder
        except AdapterInvalid:
            if _name(folder) not in map(_name, self._used()):
                await self._remove(folder)
            raise
        finally:
            self.in_use(folder)
            if not self._background.tasks:
                self._background.spawn(self.remove_unused())

    async def stop(self) -> None:
        await self._background.end()

    def in_use(self, folder: str) -> None:
        """Note that an adapter is loaded from a folder, if only for a moment."""
        self._unused.pop(_name(folder), None)

    async def remove_unused(self) -> None:
        """Remove what no adapter has been loaded from for ``KEEP_SECONDS``."""
        root = self._root
        if root is None:
            return
        try:
            now = time.monotonic()
            there = await asyncio.to_thread(_names, root)
            used = set(map(_name, self._used()))
            self._unused = {name: self._unused.get(name, now) for name in there if name not in used}
            for name in [name for name, since in self._unused.items() if now - since > KEEP_SECONDS]:
                if name in self._unused and name not in map(_name, self._used()):
                    await self._remove(f"{root}/{name}")
        except Exception as error:  # each filesystem raises its own types
            logger.warning("uploads that no adapter is loaded from were not removed: %s", error)

    async def _remove(self, folder: str) -> None:
        try:
            await run_to_completion(asyncio.to_thread(_remove, folder))
        except Exception as error:  # each filesystem raises its own types
            logger.warning("an upload was not removed: %s", error)


def _names(root: str) -> list[str]:
    import fsspec

    system, path = fsspec.core.url_to_fs(root)
    system.invalidate_cache()  # other gateways write here, too
    return [_name(folder) for folder in system.ls(path, detail=False)]


def _remove(folder: str) -> None:
    import fsspec

    system, path = fsspec.core.url_to_fs(folder)
    system.rm(path, recursive=True)


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
