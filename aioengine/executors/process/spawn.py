"""Starts one worker process, connects to it, and logs what it prints."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections import deque
from collections.abc import Callable
from typing import Protocol, cast

from aioengine.executors.process.wire import Frames

WORKER_MODULE = "aioengine.executors.process.worker"
"""Module that a worker process runs."""
MAX_LINE = 2000
"""Maximum bytes of a line of output; a longer one is split."""
KEPT_LINES = 40
"""Number of lines that are kept to tell why a worker has ended."""
OUTPUT_SECONDS = 1.0
"""How long to wait for an ended worker's output: a process that it started may still hold the pipe."""

logger = logging.getLogger("aioengine.workers")


class WorkerProcess(Protocol):
    """The process of a worker."""

    @property
    def pid(self) -> int: ...

    def kill(self) -> None:
        """Kill the process at once. May raise ProcessLookupError if it has ended."""

    async def wait(self) -> int | str:
        """Wait until the process has ended. Returns its exit status, or how it ended."""


class WorkerOutput(asyncio.Protocol):
    """Copies what a worker writes to its standard streams into the engine's log. A worker that inherited the
    engine's streams could block in the middle of a step, if nobody reads them."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._rest = b""
        self._over = asyncio.get_running_loop().create_future()
        self.last: deque[str] = deque(maxlen=KEPT_LINES)
        """The last lines."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._pipe = transport

    def data_received(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_LINE:
            lines, self._rest = [*lines, self._rest], b""
        self._tell(lines)

    def connection_lost(self, error: Exception | None) -> None:
        self._tell([self._rest])
        self._over.set_result(None)

    async def ended(self) -> None:
        """Wait until everything is logged; the worker must have ended."""
        await asyncio.wait([self._over], timeout=OUTPUT_SECONDS)
        self._pipe.close()

    def _tell(self, lines: list[bytes]) -> None:
        for line in lines:
            for begin in range(0, len(line), MAX_LINE):
                if text := line[begin : begin + MAX_LINE].decode(errors="replace").rstrip():
                    self.last.append(text)
                    logger.warning("worker %d: %s", self._rank, text)


class WorkerConnection(asyncio.Protocol):
    """A worker, and the stream to it.

    Args:
        received: Called with each message that the worker sends, still encoded.
        lost: Called when the stream has ended.
    """

    _transport: asyncio.Transport

    def __init__(
        self,
        rank: int,
        process: WorkerProcess,
        received: Callable[[WorkerConnection, bytes], None],
        lost: Callable[[WorkerConnection], None],
        output: WorkerOutput | None = None,
    ) -> None:
        self.rank = rank
        self.process = process
        self.output = output
        self._received = received
        self._lost = lost
        self._frames = Frames()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        for message in self._frames.feed(data):
            self._received(self, message)

    def connection_lost(self, error: Exception | None) -> None:
        self._lost(self)

    def write(self, data: bytes) -> None:
        self._transport.write(data)

    def close(self) -> None:
        self._transport.close()


async def spawn(
    rank: int,
    received: Callable[[WorkerConnection, bytes], None],
    lost: Callable[[WorkerConnection], None],
) -> WorkerConnection:
    """Start the worker of a rank. If it fails or is cancelled, no process is left."""
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    outlet, inlet = os.pipe()
    try:
        with theirs:
            process = await start_process(theirs.fileno(), inlet)
    except BaseException:
        ours.close()
        os.close(outlet)
        raise
    finally:
        os.close(inlet)  # the worker owns it
    output = WorkerOutput(rank)
    worker = WorkerConnection(rank, process, received, lost, output)
    try:
        await loop.connect_read_pipe(lambda: output, os.fdopen(outlet, "rb", buffering=0))
        await loop.create_unix_connection(lambda: worker, sock=ours)
    except BaseException:
        ours.close()
        process.kill()
        await process.wait()
        raise
    return worker


async def start_process(connection: int, output: int) -> WorkerProcess:
    """Start a worker that is given these descriptors: of its stream, and of its standard output and error."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",  # no file in the current folder may take the place of a module
        "-m",
        WORKER_MODULE,
        str(connection),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        pass_fds=[connection],
        env=worker_environment(),
    )


def worker_environment() -> dict[str, str]:
    """Return a worker's environment: it finds the same modules as this process, gloo uses the loopback
    interface, and OpenMP's threads soon sleep when they wait for each other."""
    environment = dict(os.environ)
    folders = [folder or os.getcwd() for folder in sys.path if isinstance(folder, str)]
    environment["PYTHONPATH"] = os.pathsep.join(folders)
    environment["GLOO_SOCKET_IFNAME"] = "lo" if sys.platform == "linux" else "lo0"
    if "OMP_WAIT_POLICY" not in environment:
        # If the application computes, one thread of a team may have to wait for a core. Without this, the
        # others would spin for a millisecond after each of torch's operations, on the core that it needs.
        environment.setdefault("GOMP_SPINCOUNT", "1000")
    # NCCL's monitoring reads the rendezvous file, which is deleted by then.
    environment.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
    return environment
