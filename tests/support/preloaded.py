"""Programs in processes that are forked from one in which torch and the package are imported already.

The imports take two or three seconds of processor time, more than most tests of a server or a worker take
for everything else. The fork server is multiprocessing's, and each process of the tests starts its own when
it first needs one. Tests of how a program starts, what it imports or how it ends with its parent start it
anew, and so is one that is to have libraries of its own (``LD_PRELOAD``).
"""

from __future__ import annotations

import asyncio
import atexit
import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping
from multiprocessing import forkserver, reduction
from typing import Any

import psutil

CONTEXT = multiprocessing.get_context("forkserver")
MODULES = (
    "torch.distributed",
    "aioengine.cli.main",
    "aioengine.cli.serve",
    "aioengine.executors.parts",
    "aioengine.model.native",
    "aioengine.model.runner",
    "aioengine.runtime.assemble",
    "aioengine.server.app",
    "aioengine.server.run",
)
"""What is imported beforehand. None of them starts a thread, which a fork would not have."""
CONTEXT.set_forkserver_preload([*MODULES])
_started: dict[int, tuple[str, Any]] = {}
"""Module and process of each program, by its process id."""


def processor_seconds() -> float:
    """Return those of the fork server, and of its programs that have ended."""
    pid = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    return 0.0 if pid is None else sum(psutil.Process(pid).cpu_times()[:4])


class Inherited:
    """A descriptor that the program gets. As one of its arguments, it is the descriptor's number there."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __reduce__(self) -> Any:
        return _detach, (reduction.DupFd(self._descriptor),)


def _detach(duplicate: Any) -> int:
    found: int = duplicate.detach()
    return found


class Program:
    """A program that runs in a process of its own, with what the tests use of asyncio's ``Process``."""

    def __init__(self, process: Any) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        found: int = self._process.pid
        return found

    @property
    def returncode(self) -> int | None:
        found: int | None = self._process.exitcode
        return found

    def send_signal(self, number: int) -> None:
        if self.returncode is not None:
            raise ProcessLookupError
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    async def wait(self) -> int:
        while (status := self.returncode) is None:
            await asyncio.sleep(0.005)
        return status


def start(
    module: str, *arguments: object, environment: Mapping[str, str], errors: int, output: int | None = None
) -> Program:
    """Run ``python -m MODULE ARGUMENTS``, with descriptors for its standard output and error."""
    streams = {2: Inherited(errors)} if output is None else {1: Inherited(output), 2: Inherited(errors)}
    process = CONTEXT.Process(target=_run, args=(module, arguments, dict(environment), streams), daemon=True)
    process.start()
    _started[process.pid] = module, process
    return Program(process)


def module_of(pid: int) -> str | None:
    """Return the module of a program that runs, which its command line does not say; None if it is no such
    program."""
    module, process = _started.get(pid, (None, None))
    return None if process is None or process.exitcode is not None else module


def _run(
    module: str, arguments: tuple[object, ...], environment: dict[str, str], streams: dict[int, int]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for number, descriptor in streams.items():
        os.dup2(descriptor, number)
    for descriptor in {*streams.values()} - {*streams}:
        os.close(descriptor)
    words = [*map(str, arguments)]
    if "LD_PRELOAD" in environment:  # only the system's loader reads it, when a program starts
        os.execve(sys.executable, [sys.executable, "-m", module, *words], environment)
    sys.argv[1:] = words
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()
