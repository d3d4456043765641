"""Copies what workers write to their standard streams into the engine's log.

A worker that inherited the engine's streams could block in the middle of a step, if nobody reads them.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque

MAX_LINE = 2000
"""Maximum bytes of a line; a longer one is split."""

KEPT_LINES = 40
"""Number of lines that are kept to tell why a worker has ended."""

logger = logging.getLogger("aioengine.workers")


class WorkerOutput:
    """A pipe that serves as one worker's standard output and error."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self.last: deque[str] = deque(maxlen=KEPT_LINES)
        """The last lines."""
        self._outlet, self.inlet = os.pipe()
        self._task: asyncio.Task[None] | None = None

    async def follow(self) -> None:
        """Log the output until the worker has ended. Closes the inlet here, because the worker owns it
        now."""
        os.close(self.inlet)
        loop = asyncio.get_running_loop()
        lines = asyncio.StreamReader(limit=MAX_LINE)
        pipe = os.fdopen(self._outlet, "rb", buffering=0)
        transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), pipe)
        self._task = loop.create_task(self._log(lines, transport), name=f"aioengine-output-{self._rank}")

    def close(self) -> None:
        """Close the pipe if no worker was started."""
        os.close(self.inlet)
        os.close(self._outlet)

    async def ended(self) -> None:
        """Wait until everything is logged; the worker must have ended."""
        if self._task is not None:
            await asyncio.wait([self._task], timeout=1.0)  # a process that it started may still hold the pipe
            self._task.cancel()

    async def _log(self, lines: asyncio.StreamReader, transport: asyncio.ReadTransport) -> None:
        rest = b""
        try:
            while part := await lines.read(MAX_LINE):
                *whole, rest = (rest + part).split(b"\n")
                for line in whole:
                    self._tell(line)
                if len(rest) > MAX_LINE:
                    self._tell(rest)
                    rest = b""
            self._tell(rest)
        finally:
            transport.close()

    def _tell(self, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip()
        if text:
            self.last.append(text)
            logger.warning("worker %d: %s", self._rank, text)
