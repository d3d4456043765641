"""Uploads: adapters that a door has received, in a folder that every replica reads."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import time
import uuid
from collections.abc import Callable, Collection, Mapping

from aioengine.errors import AdapterLoadError, ConfigError
from aioengine.fleet.registry import write_file
from aioengine.model.files.hub import is_source
from aioengine.model.files.remote import check_protocol, why_failed
from aioengine.step import BytesLike

logger = logging.getLogger("aioengine.fleet")

KEEP_SECONDS = 3600.0
"""How long an upload that no adapter is loaded from is kept since it was first seen so, or was seen to be
written again: another door may be loading it, and requests may still need the version that was replaced.
It is this door's own time, because a store's clock may be another one, and a system's clock may be set."""


class Uploads:
    """Uploads below the registry's folder, in a folder each that is named by the SHA-256 of its files."""

    def __init__(self, registry: str | None) -> None:
        self._root: str | None = None
        if registry is not None:
            place = registry if is_source(registry) else os.path.abspath(os.path.expanduser(registry))
            self._root = f"{place.rstrip('/')}/uploads"
        self._removing = asyncio.Lock()
        self._unused: dict[str, tuple[float, float | None]] = {}
        """By the folder of an upload that is not in use: when this door has first seen that, and when the
        store says that its last file was written."""

    async def store(self, name: str, config: bytes, weights: BytesLike) -> str:
        """Write an adapter's files, and return their folder. Raises ConfigError without a registry, and
        AdapterLoadError if they cannot be written."""
        if self._root is None:
            raise ConfigError(
                f"adapter {name!r}: a fleet keeps uploads below its registry, so that every replica can read "
                "them: set registry (--registry) to a folder or URL that doors and replicas share, or load "
                "the adapter from such a folder"
            )
        return await asyncio.to_thread(_store, self._root, name, config, weights)

    def in_use(self, folder: str) -> None:
        """Note that an adapter is loaded from a folder, if only for a moment."""
        self._unused.pop(_name(folder), None)

    async def remove_unused(self, used: Callable[[], Collection[str]], invalid: str | None = None) -> None:
        """Remove what has not been among the folders that ``used`` returns for ``KEEP_SECONDS``, and
        ``invalid``, which nobody can load, at once."""
        if self._root is None:
            return
        try:
            async with self._removing:
                written = await asyncio.to_thread(_written, self._root)
                for name in self._to_remove(written, set(map(_name, used())), invalid and _name(invalid)):
                    await asyncio.to_thread(_remove, self._root, name)
        except Exception as error:  # each filesystem raises its own types
            logger.warning("uploads that no adapter is loaded from were not removed: %s", error)

    def _to_remove(
        self, written: Mapping[str, float | None], wanted: Collection[str], invalid: str | None
    ) -> list[str]:
        now, removed = time.monotonic(), list[str]()
        before, self._unused = self._unused, {}
        for name in written.keys() - wanted:
            at = written[name]
            since, was_written = before.get(name, (now, at))
            if at is None or at != was_written:  # without files, it is about to be written
                since = now
            if now - since > KEEP_SECONDS or name == invalid:
                removed.append(name)
            else:
                self._unused[name] = since, at
        return removed


def _written(root: str) -> dict[str, float | None]:
    """Return when the last file of each upload was written, as the store says; None: it has no files."""
    import fsspec

    system, path = fsspec.core.url_to_fs(root)
    system.invalidate_cache()  # other doors write here, too
    found: dict[str, float | None] = {}
    for folder in system.ls(path, detail=False):
        files = system.ls(folder, detail=False)
        found[_name(folder)] = max((system.modified(file).timestamp() for file in files), default=None)
    return found


def _remove(root: str, name: str) -> None:
    import fsspec

    system, path = fsspec.core.url_to_fs(root)
    system.rm(f"{path}/{name}", recursive=True)


def _name(folder: str) -> str:
    """Return the last part, which says what is in it, wherever a door or a replica has the root."""
    return folder.rstrip("/").rpartition("/")[2]


def _store(root: str, name: str, config: bytes, weights: BytesLike) -> str:
    folder = f"{root}/{_digest(config, weights)}"
    part = f".{uuid.uuid4().hex}"  # another door may be given the same
    try:
        check_protocol(root, "registry")
        write_file(f"{folder}/adapter_config.json", config, part=part)
        write_file(f"{folder}/adapter_model.safetensors", bytes(weights), part=part)
    except ConfigError:
        raise
    except Exception as error:  # each filesystem raises its own types
        why = f"the upload cannot be stored: {why_failed(error)[0]}"
        raise AdapterLoadError(why, name=name, path=folder) from None
    return folder


def _digest(config: bytes, weights: BytesLike) -> str:
    sha = hashlib.sha256(config)
    sha.update(weights)
    return sha.hexdigest()
