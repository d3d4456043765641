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
from queue import SimpleQueue
from threading import Thread
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
FLUSH_BYTES = 2**16
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
        self._lines = bytearray()
        self._pending = 0
        """Bytes that the thread has not written yet."""
        self._encode = msgspec.json.Encoder(enc_hook=plain).encode
        self._queue: SimpleQueue[bytes | None] = SimpleQueue()
        self._timer: asyncio.TimerHandle | None = None
        self._detach: Callable[[], None] | None = None

    def attach(self, engine: AsyncEngine) -> None:
        """Begin, on the running loop. ``engine`` has been started."""
        if self._detach is not None:
            raise RuntimeError("a TraceWriter is attached once")
        self._loop = asyncio.get_running_loop()
        self._unix = time.time() - self._loop.time()
        self._closed = asyncio.Event()
        # A daemon, so that a disk that hangs does not keep the process from its end.
        Thread(target=self._write_all, name="aioengine-record", daemon=True).start()
        self._detach = engine.add_listener(self.handle)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Write what has ended, and close the file. Requests that are still under way are not recorded."""
        if self._detach is None:
            self._file.close()
            return
        if self._closed.is_set():
            return
        if not self.failed:
            self._detach()
            for row in self._waiting:
                self._take(row)
            self.flush()
        self._queue.put(None)
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._closed.wait()
        except TimeoutError:
            self._fail(f"the disk has not answered for {CLOSE_SECONDS:.0f} seconds")

    def flush(self) -> None:
        """Let the thread write at once what it would write within a second."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._pending + len(self._lines) > MAX_PENDING:
            self._fail(f"the disk is {self._pending} bytes behind")
        elif self._lines:
            self._pending += len(self._lines)
            self._queue.put(bytes(self._lines))
            self._lines.clear()

    def handle(self, event: events.Event) -> None:
        """Listen to the engine's events."""
        if isinstance(event, events.RequestAdded):
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
        if len(self._lines) >= FLUSH_BYTES:
            self.flush()
        elif self._lines and self._timer is None:
            self._timer = self._loop.call_later(FLUSH_SECONDS, self.flush)

    def _take(self, row: dict[str, Any]) -> None:
        if row["output_tokens"] is not None:
            self._lines += self._encode(row) + b"\n"
            self.rows += 1

    def _written(self, size: int) -> None:
        self._pending -= size

    def _fail(self, reason: str) -> None:
        if self.failed:
            return
        self.failed = True
        if self._detach is not None:
            with suppress(ValueError):  # it is closing, and has been taken off the engine's list
                self._detach()
        if self._timer is not None:
            self._timer.cancel()
        for kept in (self._waiting, self._under_way, self._lines):
            kept.clear()
        logger.warning("recording to %s has ended, and serving goes on: %s", self.path, reason)

    # In the thread

    def _write_all(self) -> None:
        try:
            while (data := self._queue.get()) is not None:
                _write(self._file, data)
                self._tell(self._written, len(data))
        except OSError as error:
            self._tell(self._fail, error.strerror or str(error))
        with suppress(OSError):
            self._file.close()
        self._tell(self._closed.set)

    def _tell(self, callback: Callable[..., None], *args: Any) -> None:
        with suppress(RuntimeError):  # the loop has been closed, and nobody waits
            self._loop.call_soon_threadsafe(callback, *args)


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
