"""Standard error without waits: lines are kept in memory, and a thread writes them.

A pipe that nobody reads blocks its writer, and a server's event loop must not block.
"""

from __future__ import annotations

import io
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

MAX_BYTES = 2**20
"""Maximum bytes that are kept; lines beyond it are dropped, and counted."""
GATHER_SECONDS = 0.05
"""Time for which lines are collected and then written together. Waking the thread for each line would slow
down the threads that log."""
FLUSH_SECONDS = 1.0
"""How long the end waits until the kept lines are written."""


class BackgroundFile(io.RawIOBase):
    """A file that a thread writes to. ``dropped`` counts the lines for which there was no room, or that could
    not be written."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._kept: list[bytes] = []
        self._size = 0
        """Bytes that are kept or being written."""
        self._changed = threading.Condition()
        self.dropped = 0
        threading.Thread(target=self._write_out, name="aioengine-log", daemon=True).start()

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def fileno(self) -> int:
        return self._fd

    def write(self, data, /):  # type: ignore[no-untyped-def] # typeshed's buffer type is not public
        kept = bytes(data)
        with self._changed:
            if self._size + len(kept) > MAX_BYTES:
                self.dropped += kept.count(b"\n")
            else:
                if not self._kept:
                    self._changed.notify_all()
                self._kept.append(kept)
                self._size += len(kept)
        return len(kept)

    def drain(self, seconds: float) -> bool:
        """Wait until everything is written. False if that takes longer than ``seconds``."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._size, seconds)

    def _write_out(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._kept)
            time.sleep(GATHER_SECONDS)
            with self._changed:
                data = b"".join(self._kept)
                self._kept.clear()
            written = 0
            with suppress(OSError):  # a full disk, a reader that has gone
                while written < len(data):
                    written += os.write(self._fd, data[written:])
            with self._changed:
                self._size -= len(data)
                self.dropped += data.count(b"\n", written)
                self._changed.notify_all()


@contextmanager
def background_stderr() -> Iterator[BackgroundFile]:
    """Have a thread write ``sys.stderr`` while the context lasts. If the last lines cannot be written within
    ``FLUSH_SECONDS`` at the end, the thread keeps writing, so that later output does not block either."""
    before = sys.stderr
    before.flush()
    file = BackgroundFile(2)
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(file), before.encoding, errors="backslashreplace", line_buffering=True
    )
    try:
        yield file
    finally:
        sys.stderr.flush()
        if file.drain(FLUSH_SECONDS):
            sys.stderr = before
