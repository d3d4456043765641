"""Records the requests of a live engine as JSON lines that :mod:`aioengine.lab.workload.traces` reads.

Lengths, names and times are written, and never what a prompt or an output says.
"""

from __future__ import annotations

import asyncio
import logging
import os
import stat
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from io import FileIO
from pathlib import Path
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, Any, Self

import msgspec

from aioengine import events
from aioengine.checks import plain
from aioengine.errors import ConfigError
from aioengine.lab.workload.traces import MAX_LINE

if TYPE_CHECKING:
    from aioengine.engine import AsyncEngine

HELD = 100_000
"""Rows that may wait for a request that arrived before them to end."""
FLUSH_SECONDS = 1.0
MAX_PENDING = 2**24
"""Bytes that may wait for a slow disk."""
CLOSE_SECONDS = 10.0
_FIRST_FIELD = b'{"time":'

logger = logging.getLogger("aioengine.lab")


class TraceWriter:
    """Appends a line to a file for every request that is accepted after :meth:`attach` and ends.

    Lines are in order of arrival: a row waits until all that arrived before it have ended. A request during
    which more than ``held`` others come is left out. Requests that were refused are no events, and are not
    recorded. Writing is a thread's work, once a second; if it fails, or the disk falls far behind, that is
    logged once and the recording ends. The engine is never held up.

    Raises ConfigError if the file cannot be written, or is there and is no recording. A line that a crash
    has left unfinished at its end is cut off.
    """

    def __init__(self, path: str | Path, *, held: int = HELD) -> None:
        self.path = Path(path)
        self.rows = 0
        """Lines that were written, or handed to the thread."""
        self.left_out = 0
        """Requests that lasted too long."""
        self.failed = False
        """Whether the writer ended before it was told to."""
        self._held = held
        self._file = _open(self.path)
        self._waiting: deque[dict[str, Any]] = deque()
        """Rows in order of arrival, fields of a trace: open requests, and ended ones that wait for these."""
        self._under_way: dict[str, dict[str, Any]] = {}
        self._encode = msgspec.json.Encoder(enc_hook=plain).encode
        self._detach: Callable[[], None] = lambda: None
        self._lock = Lock()
        """For the two that the thread changes, too."""
        self._lines = bytearray()
        self._pending = 0
        """Bytes that are not written yet."""
        self._wake = Event()
        self._ending = False
        # A daemon, so that a disk that hangs does not keep the process from its end.
        self._thread = Thread(target=self._write_all, name="aioengine-record", daemon=True)

    def attach(self, engine: AsyncEngine) -> None:
        """Begin, once, on the running loop. ``engine`` has been started."""
        self._thread.start()
        self._unix = time.time() - asyncio.get_running_loop().time()
        self._detach = engine.add_listener(self.handle)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Write what has ended, and close the file. Requests that are still under way are not recorded."""
        if self._thread.ident is None:
            self._file.close()
            return
        self._stop_listening()
        while self._waiting and not self.failed:
            self._take(self._waiting.popleft())
        self._ending = True
        self.flush()
        await asyncio.to_thread(self._thread.join, CLOSE_SECONDS)
        if self._thread.is_alive():
            self._fail(f"the disk has not answered for {CLOSE_SECONDS:.0f} seconds")

    def flush(self) -> None:
        """Let the thread write at once what it would write within a second."""
        self._wake.set()

    def handle(self, event: events.Event) -> None:
        """Listen to the engine's events."""
        if self.failed:
            self._stop_listening()
        elif isinstance(event, events.RequestAdded):
            self._added(event)
        elif isinstance(event, events.RequestEnded) and event.request_id in self._under_way:
            self._under_way.pop(event.request_id)["output_tokens"] = event.output_tokens
            self._take_ended()

    def _added(self, event: events.RequestAdded) -> None:
        row = {
            "time": round(self._unix + event.time, 6),
            "adapter": event.adapter,
            "prompt_tokens": event.prompt_tokens,
            "output_tokens": None,
            "tenant": event.tenant,
            "priority": event.priority,
            "deadline": None if event.deadline is None else round(event.deadline - event.time, 6),
        }
        self._waiting.append(row)
        self._under_way[event.request_id] = row
        if len(self._waiting) > self._held:  # the oldest, which has not ended, keeps the others waiting
            oldest = self._waiting.popleft()
            self._under_way = {key: row for key, row in self._under_way.items() if row is not oldest}
            self.left_out += 1
            if self.left_out == 1:
                logger.warning(
                    "recording to %s: a request has lasted while %d others came, and is left out (said only "
                    "now)",
                    self.path,
                    self._held,
                )
            self._take_ended()

    def _take_ended(self) -> None:
        while self._waiting and self._waiting[0]["output_tokens"] is not None:
            self._take(self._waiting.popleft())

    def _take(self, row: dict[str, Any]) -> None:
        """Hand the row of a request to the thread, if the request has ended."""
        if row["output_tokens"] is None:
            return
        line = self._encode(row) + b"\n"
        self.rows += 1
        with self._lock:
            self._lines += line
            self._pending += len(line)
        if self._pending > MAX_PENDING:
            self._fail(f"the disk is {self._pending} bytes behind")

    def _stop_listening(self) -> None:
        self._detach()
        self._detach = lambda: None

    def _fail(self, reason: str) -> None:
        if not self.failed:
            self.failed = True
            logger.warning("recording to %s has ended, and serving goes on: %s", self.path, reason)

    def _write_all(self) -> None:
        """Write lines until the end, in the thread."""
        try:
            ending = False
            while not ending and not self.failed:
                self._wake.wait(FLUSH_SECONDS)
                self._wake.clear()
                ending = self._ending
                with self._lock:
                    data = bytes(self._lines)
                    self._lines.clear()
                if data:
                    _write(self._file, data)
                with self._lock:
                    self._pending -= len(data)
        except OSError as error:
            self._fail(error.strerror or str(error))
        with suppress(OSError):
            self._file.close()


def _open(path: Path) -> FileIO:
    """Open a file, and cut off a line that a crash has left unfinished. Raises ConfigError if that fails, or
    the file is no recording."""
    try:
        file = open(path, "a+b", buffering=0)  # noqa: SIM115 # closed by close()
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return file
        file.seek(0)
        if not _FIRST_FIELD.startswith(file.read(len(_FIRST_FIELD))):
            file.close()
            raise ConfigError(f"cannot record to {path}: it is there, and is no recording; give another name")
        begin = max(file.seek(0, os.SEEK_END) - MAX_LINE, 0)
        file.seek(begin)
        file.truncate(begin + file.read().rfind(b"\n") + 1)
    except OSError as error:
        raise ConfigError(f"cannot record to {path}: {error.strerror}") from error
    return file


def _write(file: FileIO, data: bytes) -> None:
    """Write all of ``data`` or, if that fails, nothing of it. Raises OSError."""
    before = os.fstat(file.fileno()).st_size
    rest = memoryview(data)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError:
        with suppress(OSError):
            file.truncate(before)
        raise
