"""A folder with copies of remote adapters, shared by several processes; evicts the least recently used."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment] # no module, so no locks

logger = logging.getLogger("aioengine")

KEEP_SECONDS = 600.0
"""Copies that were asked for within this time are kept even beyond the bound, because they are about to be
read."""
STALE_SECONDS = 86400.0
"""An unfinished copy this old was left by a process that was killed."""
UNFINISHED = ".part-"

_LOCK = ".lock"
_KEY = re.compile(r"[0-9a-f]{32}")


class _Copy(NamedTuple):
    used: float
    size: int
    folder: Path


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
        self._checked: dict[Path, str] = {}
        """State of a copy's files when their digests were last checked."""

    def get(self, adapter: str, version: str, fetch: Callable[[Path], None]) -> Path:
        """Return the copy of an adapter's version; both arguments are keys. If there is none, ``fetch`` fills
        an empty folder. Only one process at a time does so for an adapter."""
        folder = self.root / adapter / version
        if not self._use(folder):
            folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with (folder.parent / _LOCK).open("ab") as file:
                if fcntl is not None:  # else several fetch it, at the cost of a download
                    fcntl.flock(file, fcntl.LOCK_EX)  # ends with the process, too
                if not self._use(folder):  # another process has fetched it meanwhile
                    self._make(folder, fetch)
            self._prune(keep=folder)
        return folder

    def _use(self, folder: Path) -> bool:
        """Mark the copy as used now. Returns whether it exists, and is as it was fetched."""
        try:
            os.utime(folder)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:  # another user's, or on a read-only disk
            if not folder.is_dir():
                return False
        try:
            looks = _looks(folder)
            if self._checked.get(folder) != looks:
                if _digests(folder) != _sealed(folder).read_text(encoding="utf-8"):
                    raise ValueError("its SHA-256 differs from that of the fetched files")
                self._checked[folder] = looks
        except (OSError, ValueError) as error:
            logger.warning("the local copy %s is fetched again: %s", folder, error)
            self._checked.pop(folder, None)
            _delete(folder)
            return False
        return True

    def _make(self, folder: Path, fetch: Callable[[Path], None]) -> None:
        staging = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=folder.parent))
        try:
            fetch(staging)
            seal = staging.with_name(f"{staging.name}.sha256")
            seal.write_text(_digests(staging), encoding="utf-8")
            seal.replace(_sealed(folder))
            try:
                staging.rename(folder)
            except OSError:
                if not folder.is_dir():  # else a process without the lock was first, with the same content
                    raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _prune(self, *, keep: Path) -> None:
        """Delete the least recently used copies, but not ``keep``, until the bound holds. Copies that cannot
        be deleted stay."""
        now = time.time()
        if self._max_bytes is None:
            return
        copies = sorted(self._copies(now))
        total = sum(copy.size for copy in copies)
        for copy in copies:
            if total <= self._max_bytes or now - copy.used < KEEP_SECONDS:
                return
            if copy.folder != keep and _delete(copy.folder):
                total -= copy.size

    def _copies(self, now: float) -> Iterator[_Copy]:
        for adapter in _subfolders(self.root):
            if not _KEY.fullmatch(adapter.name):
                continue
            for folder in _subfolders(adapter):
                with suppress(OSError):  # it may be deleted meanwhile
                    used = folder.stat().st_mtime
                    if _KEY.fullmatch(folder.name):
                        yield _Copy(used, sum(f.stat().st_size for f in folder.iterdir()), folder)
                    elif folder.name.startswith(UNFINISHED) and now - used > STALE_SECONDS:
                        shutil.rmtree(folder, ignore_errors=True)


def _subfolders(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
    except OSError:
        return []


def _sealed(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.sha256")


def _looks(folder: Path) -> str:
    """Return sizes, times and inodes of the files, which show cheaply whether one has changed."""
    found = []
    for path in sorted(folder.iterdir()):
        status = path.stat()
        found.append(f"{path.name} {status.st_size} {status.st_mtime_ns} {status.st_ino}")
    return "\n".join(found)


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
    _sealed(folder).unlink(missing_ok=True)
    shutil.rmtree(gone, ignore_errors=True)
    return True
