"""A folder with copies of remote adapters, shared by several processes; evicts the least recently used."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

KEEP_SECONDS = 600.0
"""Copies that were asked for within this time are kept even beyond the bound, because they are about to be
read."""
STALE_SECONDS = 86400.0
"""An unfinished copy this old was left by a process that was killed."""
UNFINISHED = ".part-"

_KEY = re.compile(r"[0-9a-f]{32}")


class _Copy(NamedTuple):
    used: float
    size: int
    folder: Path


class LocalCopies:
    """Copies are the folders ``root/KEY/KEY``, each key 32 hexadecimal digits; nothing else in ``root`` is
    touched. A copy is complete or not there: it is made, and taken away, under another name. When it was
    used last is its folder's modification time. All methods block.

    Args:
        max_bytes: Bound on the size of all copies; None for no bound.
    """

    def __init__(self, root: Path, max_bytes: int | None) -> None:
        self.root = root
        self._max_bytes = max_bytes

    def path(self, adapter: str, version: str) -> Path:
        """Return the path of an adapter version's copy, or None. Both arguments are keys."""
        return self.root / adapter / version

    def use(self, folder: Path) -> bool:
        """Mark the copy as used now. Returns whether it exists."""
        try:
            os.utime(folder)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:  # somebody else's, or on a medium that cannot be written
            return folder.is_dir()
        return True

    def staging(self, folder: Path) -> Path:
        """Create an empty folder beside ``folder``, to be filled and then renamed to it."""
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=folder.parent))

    def prune(self, *, keep: Path) -> None:
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
                with suppress(OSError):  # it goes as we look
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


def _delete(folder: Path) -> bool:
    gone = folder.with_name(UNFINISHED + os.urandom(8).hex())
    try:
        folder.rename(gone)
    except OSError:
        return False
    shutil.rmtree(gone, ignore_errors=True)
    return True
