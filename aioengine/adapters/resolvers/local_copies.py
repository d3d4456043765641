"""A folder of copies of remote adapters, that several processes share: who was used least recently goes."""

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
"""What was asked for within this time stays, whatever the bound: somebody is about to read it."""
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
        max_bytes: How much the copies may take together; None for any.
    """

    def __init__(self, root: Path, max_bytes: int | None) -> None:
        self.root = root
        self._max_bytes = max_bytes

    def path(self, adapter: str, version: str) -> Path:
        """Where the copy of an adapter's version is, if it is there. Both are keys."""
        return self.root / adapter / version

    def use(self, folder: Path) -> bool:
        """Whether the copy is there; if so, it was used now."""
        try:
            os.utime(folder)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:  # somebody else's, or on a medium that cannot be written
            return folder.is_dir()
        return True

    def staging(self, folder: Path) -> Path:
        """An empty folder beside ``folder``, to be filled and renamed to it."""
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=folder.parent))

    def prune(self, *, keep: Path) -> None:
        """Delete what was used least recently until the bound is kept, but not ``keep``. What cannot be
        deleted stays."""
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
