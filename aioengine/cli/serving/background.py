"""A log without waits: lines are kept in memory, and a thread writes them to standard error.

A pipe that nobody reads blocks its writer, and a server's event loop must not block.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from contextlib import suppress

MAX_BYTES = 2**20
"""Maximum bytes that are kept; lines beyond it are dropped, and counted."""
GATHER_SECONDS = 0.05
"""Time for which lines are collected and then written together. Waking the thread for each line would slow
down the threads that log."""
FLUSH_SECONDS = 1.0
"""How long the end waits until the kept lines are written."""


class BackgroundHandler(logging.Handler):
    """Handler whose lines a thread writes to a file descriptor. ``dropped`` counts those for which there was
    no room, or that could not be written."""

    def __init__(self, fd: int = 2) -> None:
        super().__init__()
        self.dropped = 0
        self._fd = fd
        self._kept: list[bytes] = []
        self._size = 0
        """Bytes that are kept or being written."""
        self._changed = threading.Condition()
        threading.Thread(target=self._write_out, name="aioengine-log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = f"{self.format(record)}\n".encode(errors="backslashreplace")
        except Exception:
            self.handleError(record)
            return
        with self._changed:
            if self._size + len(line) > MAX_BYTES:
                self.dropped += 1
                return
            self._kept.append(line)
            self._size += len(line)
            if len(self._kept) == 1:
                self._changed.notify_all()

    def drain(self, seconds: float) -> bool:
        """Wait until everything is written. False if that takes longer than ``seconds``."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._size, seconds)

    def close(self) -> None:
        """Wait for the last lines. If they cannot be written in time, the thread goes on with them."""
        self.drain(FLUSH_SECONDS)
        super().close()

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
