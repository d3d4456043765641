"""A folder with copies of remote adapters, shared by several processes; evicts the least recently used."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger("aioengine")

KEEP_SECONDS = 600.0
"""Copies that were asked for within this time are kept even beyond the bound, because they are about to be
read."""
STALE_SECONDS = 86400.0
"""An unfinished copy this old was left by a process that was killed."""
UNFINISHED = ".part-"

_LOCK = ".lock"
_KEY = re.compile(r"[0-9a-f]{32}")


class LocalCopies:
    """Copies are the folders ``root/KEY/KEY``, each key 32 hexadecimal digits; nothing else in ``root`` is
    touched. A copy is complete or not there: it is made, and deleted, under another name. Its folder's
    modification time says when it was used last. ``root/KEY/KEY.sha256`` has the SHA-256 of its files: a copy
    that does not agree with them is deleted. All methods block.

    (fsspec's ``filecache`` keeps single files under names of its own, without a bound on their size, without
    digests, and without a lock between processes.)

    Args:
        max_bytes: Bound on the size of all copies; None for no bound.
    """

    def __init__(self, root: Path, max_bytes: int | None) -> None:
        self.root = root
        self._max_bytes = max_bytes

    def get(self, adapter: str, version: str, fetch: Callable[[Path], None]) -> Path:
        """Return the copy of an adapter's version; both arguments are keys. If there is none, ``fetch`` fills
        an empty folder. Only one process at a time does so for an adapter."""
        folder = self.root / adapter / version
        if not _use(folder):
            folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with (folder.parent / _LOCK).open("ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # ends with the process, too
                if not _use(folder):  # another process has fetched it meanwhile
                    staging = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=folder.parent))
                    try:
                        fetch(staging)
                        _seal(folder).write_text(_digests(staging), encoding="utf-8")
                        staging.rename(folder)
                    finally:
                        shutil.rmtree(staging, ignore_errors=True)
            self._prune(keep=folder)
        return folder

    def _prune(self, *, keep: Path) -> None:
        """Delete the least recently used copies, but not ``keep``, until the bound holds. Copies that cannot
        be deleted stay. Deletes what is left of processes that were killed."""
        if self._max_bytes is None:
            return
        now, copies = time.time(), list[tuple[float, int, Path]]()
        for folder in self.root.glob("*/*"):
            with suppress(OSError):  # it may be deleted meanwhile
                if not _KEY.fullmatch(folder.parent.name) or folder.is_symlink() or not folder.is_dir():
                    continue
                used = folder.stat().st_mtime
                if _KEY.fullmatch(folder.name):
                    copies.append((used, sum(file.stat().st_size for file in folder.iterdir()), folder))
                elif folder.name.startswith(UNFINISHED) and now - used > STALE_SECONDS:
                    shutil.rmtree(folder, ignore_errors=True)
        total = sum(size for _, size, _ in copies)
        for used, size, folder in sorted(copies):
            if total <= self._max_bytes or now - used < KEEP_SECONDS:
                return
            if folder != keep and _delete(folder):
                total -= size


def _use(folder: Path) -> bool:
    """Mark a copy as used now. Returns whether it exists, and is as it was fetched."""
    if not folder.is_dir():
        return False
    with suppress(OSError):  # another user's, or on a read-only disk
        os.utime(folder)
    try:
        good = _digests(folder) == _seal(folder).read_text(encoding="utf-8")
    except OSError:
        good = False
    if not good:
        logger.warning("the local copy %s is fetched again: it is not as it was fetched", folder)
        _delete(folder)
    return good


def _seal(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.sha256")


def _digests(folder: Path) -> str:
    """Return the digests in the form of sha256sum."""
    lines = []
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n")
    return "".join(lines)


def _delete(folder: Path) -> bool:
    gone = folder.with_name(UNFINISHED + os.urandom(8).hex())
    try:
        folder.rename(gone)
    except OSError:
        return False
    _seal(folder).unlink(missing_ok=True)
    shutil.rmtree(gone, ignore_errors=True)
    return True
