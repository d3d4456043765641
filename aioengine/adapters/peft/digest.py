"""Digests of an adapter's content. Does not import torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import NamedTuple

from aioengine.adapters.peft.folder import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    SAFETENSORS_FILE,
    AdapterFolder,
    naming,
)
from aioengine.errors import AdapterChanged
from aioengine.model.pooling import POOLING_FILE
from aioengine.step import AdapterSource, MixFiles, MixPart

_PIECE_BYTES = 4 << 20
"""Size of one read. Reading and hashing release the interpreter lock, and each piece has to take it again."""


class BackgroundDigest:
    """SHA-256 of what is read, computed in a thread beside the work on it. What is hashed must not change."""

    def __init__(self) -> None:
        self._sha = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1, "aioengine-load-helper")

    def update(self, data: bytes | memoryview) -> None:
        self._thread.submit(self._sha.update, data)

    def result(self) -> Callable[[], str]:
        """Return a function that waits for the digest, in hexadecimal."""
        return self._thread.submit(self._sha.hexdigest).result

    def close(self) -> None:
        """Let the thread end when it has hashed what it was given."""
        self._thread.shutdown(wait=False)


class ContentDigest(NamedTuple):
    digest: str
    """SHA-256 of the content, as in :class:`aioengine.adapters.peft.pack.PackedAdapter`."""
    version: str
    """Version of the hashed files, as in :class:`aioengine.adapters.peft.folder.AdapterFolder`."""


def content_digest(
    name: str, path: str, unwanted: Event, files: AdapterSource | None = None
) -> ContentDigest:
    """Compute the digest of the adapter in the folder ``path``, or of ``files`` in its place, valid or
    not, for ranks that each read only their share. Blocks. Once ``unwanted`` is set it ends soon,
    and the result has no meaning.

    Raises AdapterLoadError if a file is missing, cannot be read, or changed while it was read; AdapterChanged
    as :func:`mix_digest`.
    """
    if isinstance(files, MixFiles):
        found = [content_digest(part.name, part.path, unwanted, part.files) for part in files.parts]
        digest = "" if unwanted.is_set() else mix_digest(files.parts, [part.digest for part in found])
        return ContentDigest(digest, ";".join(part.version for part in found))
    sha, piece = hashlib.sha256(), memoryview(bytearray(_PIECE_BYTES))
    with naming(name, path):
        folder = AdapterFolder(path, files=files)
        folder.check()
        sha.update(folder.content(CONFIG_FILE, MAX_CONFIG_BYTES))
        for file in (SAFETENSORS_FILE, POOLING_FILE) if folder.has(POOLING_FILE) else (SAFETENSORS_FILE,):
            with folder.open(file) as opened:
                for begin in range(0, opened.size, _PIECE_BYTES):
                    if unwanted.is_set():
                        break
                    part = piece[: opened.size - begin]
                    opened.read_into(part)
                    sha.update(part)
        folder.check_unchanged()
    return ContentDigest(sha.hexdigest(), folder.version)


def mix_digest(parts: Sequence[MixPart], digests: Sequence[str]) -> str:
    """Return the digest of a mix whose parts' contents have these digests. Raises AdapterChanged if a part
    has another content than it must have."""
    sha = hashlib.sha256()
    for part, digest in zip(parts, digests, strict=True):
        if part.digest not in ("", digest):
            raise AdapterChanged(
                "its files have changed since it was loaded: load it with replace=True",
                name=part.name,
                path=part.path,
            )
        sha.update(f"{digest}*{part.weight!r};".encode())
    return sha.hexdigest()
