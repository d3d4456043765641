"""Starts one worker process, and connects to it."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Callable
from typing import Protocol, cast

from aioengine.executors.process.wire import Frames

WORKER_MODULE = "aioengine.executors.process.worker"
"""Module that a worker process runs."""


class WorkerProcess(Protocol):
    """The process of a worker."""

    @property
    def pid(self) -> int: ...

    def kill(self) -> None:
        """Kill the process at once. May raise ProcessLookupError if it has ended."""

    async def wait(self) -> int | str:
        """Wait until the process has ended. Returns its exit status, or how it ended."""


class WorkerConnection(asyncio.Protocol):
    """A worker, and the stream to it.

    Args:
        received: Called with each message that the worker sends, still encoded.
        lost: Called when the stream has ended.
    """

    transport: asyncio.Transport

    def __init__(
        self,
        rank: int,
        process: WorkerProcess,
        received: Callable[[WorkerConnection, bytes], None],
        lost: Callable[[WorkerConnection], None],
    ) -> None:
        self.rank = rank
        self.process = process
        self._received = received
        self._lost = lost
        self._frames = Frames()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        for message in self._frames.feed(data):
            self._received(self, message)

    def connection_lost(self, error: Exception | None) -> None:
        self._lost(self)


async def spawn(
    rank: int,
    received: Callable[[WorkerConnection, bytes], None],
    lost: Callable[[WorkerConnection], None],
) -> WorkerConnection:
    """Start the worker of a rank. If it fails or is cancelled, no process is left."""
    ours, theirs = socket.socketpair()
    process: WorkerProcess | None = None
    try:
        with theirs:
            process = await start_process(rank, theirs.fileno())
        worker = WorkerConnection(rank, process, received, lost)
        await asyncio.get_running_loop().create_unix_connection(lambda: worker, sock=ours)
    except BaseException:
        ours.close()
        if process is not None:
            process.kill()
            await process.wait()
        raise
    return worker


async def start_process(rank: int, connection: int) -> WorkerProcess:
    """Start the worker of a rank, which is given the descriptor of its stream. What it prints goes to the
    standard error of this process."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",  # no file in the current folder may take the place of a module
        "-m",
        WORKER_MODULE,
        str(rank),
        str(connection),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=2,  # as its standard error, which it inherits
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
