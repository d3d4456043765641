"""Starts one worker process, connects to it, and logs what it prints."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Protocol, cast

from aioengine.executors.process.wire import Frames

WORKER_MODULE = "aioengine.executors.process.worker"
"""Module that a worker process runs."""
MAX_LINE = 2000
"""Maximum characters of a line of output; a longer one is split."""
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


class WorkerOutput:
    """Copies what a worker writes to its standard streams into the engine's log, in a thread. A worker that
    inherited the engine's streams could block in the middle of a step, if nobody reads them."""

    def __init__(self, rank: int, descriptor: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._over = self._loop.create_future()
        self.last: deque[str] = deque(maxlen=KEPT_LINES)
        """The last lines."""
        thread = threading.Thread(target=self._copy, args=(rank, descriptor), daemon=True)
        thread.name = f"aioengine-worker-output-{rank}"
        thread.start()

    def _copy(self, rank: int, descriptor: int) -> None:
        with os.fdopen(descriptor, encoding="utf-8", errors="replace") as pipe:
            for line in iter(partial(pipe.readline, MAX_LINE), ""):
                if text := line.rstrip():
                    self.last.append(text)
                    logger.warning("worker %d: %s", rank, text)
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._over.set_result, None)

    async def ended(self) -> None:
        """Wait until everything is logged; the worker must have ended."""
        await asyncio.wait([self._over], timeout=OUTPUT_SECONDS)


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
    ours, theirs = socket.socketpair()
    outlet, inlet = os.pipe()
    output = WorkerOutput(rank, outlet)
    process: WorkerProcess | None = None
    try:
        with theirs:
            process = await start_process(theirs.fileno(), inlet)
        worker = WorkerConnection(rank, process, received, lost, output)
        await asyncio.get_running_loop().create_unix_connection(lambda: worker, sock=ours)
    except BaseException:
        ours.close()
        if process is not None:
            process.kill()
            await process.wait()
        raise
    finally:
        os.close(inlet)  # the worker owns it
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
