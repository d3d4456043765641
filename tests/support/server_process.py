"""``aioengine serve`` in a process of its own, forked from one with its imports, on a free port."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from support import preloaded

SMALL = ["--max-model-len", "500", "--kv-cache-memory", "4MiB", "--max-loras", "2", "--dtype", "float32"]


class Log(NamedTuple):
    """What a process writes to its standard error."""

    lines: asyncio.StreamReader
    pipe: asyncio.ReadTransport


class Serving:
    """``lines`` is its log, read as it comes."""

    def __init__(self, process: preloaded.Program, log: Log, url: str) -> None:
        self.process = process
        self._log = log
        self.url = url
        self.lines: list[dict[str, Any]] = []
        self._reading = asyncio.create_task(self._read())

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.partition("://")[2].rpartition(":")
        return host, int(port)

    @contextlib.contextmanager
    def unread(self) -> Iterator[None]:
        """Nobody reads its log meanwhile."""
        self._log.pipe.pause_reading()
        try:
            yield
        finally:
            self._log.pipe.resume_reading()

    async def end(self) -> int:
        """Its exit code, once it has ended."""
        await asyncio.wait_for(self._reading, 60)
        return await asyncio.wait_for(self.process.wait(), 60)

    async def _read(self) -> None:
        async for line in self._log.lines:
            self.lines.append(json.loads(line))


async def follow(outlet: int) -> Log:
    """Read a pipe, lines of up to 1 MiB."""
    lines = asyncio.StreamReader(limit=2**20)
    pipe = os.fdopen(outlet, "rb", buffering=0)
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), pipe)
    return Log(lines, transport)


@contextlib.asynccontextmanager
async def serving(
    model: Path | str, *flags: str, module: str = "aioengine", **environment: str
) -> AsyncIterator[Serving]:
    """Serves ``model`` with small caches; ``flags`` are added, or replace those. ``module`` is run in place
    of the program. Killed at the end if it still runs."""
    small = [
        part for pair in zip(SMALL[::2], SMALL[1::2], strict=True) if pair[0] not in flags for part in pair
    ]
    port = [] if "--port" in flags else ["--port", "0"]
    arguments = ["serve", "--model", str(model), *port, "--log-format", "json", *small, *flags]
    outlet, inlet = os.pipe()
    process = preloaded.start(module, *arguments, environment={**os.environ, **environment}, errors=inlet)
    os.close(inlet)
    log = await follow(outlet)
    try:
        async with asyncio.timeout(120):
            while True:
                line = (await log.lines.readline()).decode()
                assert line, "it ended before it served"
                found = re.search(r"serving at (https?://\S+)", line)
                if found:
                    break
        yield Serving(process, log, found[1])
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        log.pipe.close()
