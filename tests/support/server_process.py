"""``aioengine serve`` in a process of its own, forked from one with its imports, on a free port."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from support import preloaded

SMALL = ["--max-model-len", "500", "--kv-cache-memory", "4MiB", "--max-loras", "2", "--dtype", "float32"]


class Serving:
    """``lines`` is its log, read as it comes."""

    def __init__(
        self, process: preloaded.Program, log: asyncio.StreamReader, pipe: asyncio.ReadTransport, url: str
    ) -> None:
        self.process = process
        self._log, self._pipe = log, pipe
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
        self._pipe.pause_reading()
        try:
            yield
        finally:
            self._pipe.resume_reading()

    async def end(self) -> int:
        """Its exit code, once it has ended."""
        await asyncio.wait_for(self._reading, 60)
        return await asyncio.wait_for(self.process.wait(), 60)

    async def _read(self) -> None:
        async for line in self._log:
            self.lines.append(json.loads(line))


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
    log = asyncio.StreamReader(limit=2**20)
    pipe, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(log), os.fdopen(outlet, "rb", buffering=0)
    )
    try:
        async with asyncio.timeout(120):
            while True:
                line = (await log.readline()).decode()
                assert line, "it ended before it served"
                found = re.search(r"serving at (https?://\S+)", line)
                if found:
                    break
        yield Serving(process, log, pipe, found[1])
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        pipe.close()
