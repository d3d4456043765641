"""Uploads: adapters that a door has received, in a folder that every replica reads."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import time
import uuid
from collections.abc import Collection

from aioengine.errors import AdapterLoadError, ConfigError
from aioengine.fleet.registry import write_file
from aioengine.model.files.hub import is_source
from aioengine.model.files.remote import check_protocol, why_failed
from aioengine.step import BytesLike

logger = logging.getLogger("aioengine.fleet")

KEEP_SECONDS = 3600.0
"""Age from which an upload that no adapter is loaded from is removed; requests may still need a younger one,
because another door is loading it, or because they run on the version that was replaced."""


class Uploads:
    """Uploads below the registry's folder, in a folder each that is named by the SHA-256 of its files."""

    def __init__(self, registry: str | None) -> None:
        self._root: str | None = None
        if registry is not None:
            place = registry if is_source(registry) else os.path.abspath(registry)
            self._root = f"{place.rstrip('/')}/uploads"

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

    async def remove_unused(self, used: Collection[str]) -> None:
        """Remove what is older than ``KEEP_SECONDS`` and not among these folders."""
        if self._root is None:
            return
        try:
            await asyncio.to_thread(_remove, self._root, used)
        except Exception as error:  # each filesystem raises its own types
            logger.warning("uploads that no adapter is loaded from were not removed: %s", error)


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


def _remove(root: str, used: Collection[str]) -> None:
    import fsspec

    system, path = fsspec.core.url_to_fs(root)
    wanted = {folder.rpartition("/")[2] for folder in used if folder.startswith(f"{root}/")}
    for folder in system.ls(path, detail=False):
        if folder.rstrip("/").rpartition("/")[2] in wanted:
            continue
        files = system.ls(folder, detail=False)
        if all(time.time() - system.modified(file).timestamp() > KEEP_SECONDS for file in files):
            system.rm(folder, recursive=True)
