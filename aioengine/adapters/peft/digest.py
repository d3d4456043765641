"""The identity of an adapter's content, for ranks that read but shares of it. No torch is imported."""

from __future__ import annotations

import hashlib
from threading import Event
from typing import NamedTuple

from aioengine.adapters.peft.folder import CONFIG_FILE, AdapterFolder

_PIECE_BYTES = 4 << 20
"""Reading and hashing release the interpreter lock, which each piece has to get back."""


class ContentDigest(NamedTuple):
    digest: str
    """As in :class:`aioengine.adapters.peft.read.PackedAdapter`."""
    version: str
    """As in :class:`aioengine.adapters.peft.folder.AdapterFolder`: of the files that it is the digest of."""


def content_digest(name: str, path: str, unwanted: Event) -> ContentDigest:
    """Of the adapter in the folder ``path``, valid or not. Blocks; once it is ``unwanted``, it soon ends,
    and what it returns means nothing.

    Raises AdapterLoadError if a file is missing, cannot be read, or changed while it was read.
    """
    folder = AdapterFolder(name, path)
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
