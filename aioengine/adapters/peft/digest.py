"""Digest of an adapter's content, for tensor-parallel ranks that each read only their share. Does not import
torch."""

from __future__ import annotations

import hashlib
from threading import Event
from typing import NamedTuple

from aioengine.adapters.peft.folder import CONFIG_FILE
from aioengine.adapters.peft.held import folder_of
from aioengine.step import HeldFiles

_PIECE_BYTES = 4 << 20
"""Size of one read. Reading and hashing release the interpreter lock, and each piece has to take it again."""


class ContentDigest(NamedTuple):
    digest: str
    """SHA-256 of the content, as in :class:`aioengine.adapters.peft.read.PackedAdapter`."""
    version: str
    """Version of the hashed files, as in :class:`aioengine.adapters.peft.folder.AdapterFolder`."""


def content_digest(name: str, path: str, unwanted: Event, files: HeldFiles | None = None) -> ContentDigest:
    """Compute the digest of the adapter in the folder ``path``, or of ``files`` in its place, whether it is
    valid or not. Blocks. Once ``unwanted`` is set it ends soon, and the result has no meaning.

    Raises AdapterLoadError if a file is missing, cannot be read, or changed while it was read.
    """
    folder = folder_of(name, path, files)
    folder.check()
    digest = hashlib.sha256()
    piece = memoryview(bytearray(_PIECE_BYTES))
    for file in (CONFIG_FILE, folder.weights_file()):
        with folder.open(file) as opened:
            for begin in range(0, opened.size, _PIECE_BYTES):
                if unwanted.is_set():
                    break
                part = piece[: opened.size - begin]
                opened.read_into(part)
                digest.update(part)
    folder.check_unchanged()
    return ContentDigest(digest.hexdigest(), folder.version)
