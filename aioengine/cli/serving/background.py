"""A log without waits: lines are kept in memory, and a thread writes them to standard error.

A pipe that nobody reads blocks its writer, and a server's event loop must not block.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from contextlib import suppress
from queue import Full, Queue

MAX_LINES = 4096
"""Maximum lines that are kept; further ones are dropped, and counted."""
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
        self._lines = Queue[bytes](MAX_LINES)
        threading.Thread(target=self._write_out, name="aioengine-log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(f"{self.format(record)}\n".encode(errors="backslashreplace"))
        except Full:
            self.dropped += 1
        except Exception:
            self.handleError(record)

    def drain(self, seconds: float) -> bool:
        """Wait until everything is written. False if that takes longer than ``seconds``."""
        lines = self._lines
        with lines.all_tasks_done:
            return lines.all_tasks_done.wait_for(lambda: not lines.unfinished_tasks, seconds)

    def close(self) -> None:
        """Wait for the last lines. If they cannot be written in time, the thread goes on with them."""
        self.drain(FLUSH_SECONDS)
        super().close()

    def _write_out(self) -> None:
        while True:
            first = self._lines.get()
            time.sleep(GATHER_SECONDS)
            kept = [first, *(self._lines.get() for _ in range(self._lines.qsize()))]
            data, written = b"".join(kept), 0
            with suppress(OSError):  # a full disk, a reader that has gone
                while written < len(data):
                    written += os.write(self._fd, data[written:])
            self.dropped += data.count(b"\n", written)
            for _ in kept:
                self._lines.task_done()
