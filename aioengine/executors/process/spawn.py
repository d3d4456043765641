"""Starts one worker process, and connects to it."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from dataclasses import dataclass
from typing import Protocol

from aioengine.executors.process.worker_output import WorkerOutput

WORKER_MODULE = "aioengine.executors.process.worker"
"""Module that a worker process runs."""


class WorkerProcess(Protocol):
    """The process of a worker."""

    @property
    def pid(self) -> int: ...

    def kill(self) -> None:
        """Kill the process at once. May raise ProcessLookupError if it has ended."""

    async def wait(self) -> int | None:
        """Wait until the process has ended. Returns its exit status; None if it is not known."""


@dataclass(eq=False)
class WorkerConnection:
    """A worker, and the stream to it."""

    rank: int
    process: WorkerProcess
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    output: WorkerOutput | None = None


async def spawn(rank: int) -> WorkerConnection:
    """Start the worker of a rank. If it fails or is cancelled, no process is left."""
    ours, theirs = socket.socketpair()
    output = WorkerOutput(rank)
    try:
        with theirs:
            process = await start_process(theirs.fileno(), output.inlet)
    except BaseException:
        ours.close()
        output.close()
        raise
    try:
        await output.follow()
        reader, writer = await asyncio.open_unix_connection(sock=ours)
    except BaseException:
        ours.close()
        process.kill()
        await process.wait()
        raise
    return WorkerConnection(rank, process, reader, writer, output)


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
