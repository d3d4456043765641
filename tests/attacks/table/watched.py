"""``aioengine`` with a heartbeat on its event loop, which notes how long the loop was held at a time.

    AIOENGINE_HELD=FILE python -m attacks.table.watched serve ...

``FILE`` is mapped by both sides: :class:`Held` reads what the server's loop writes. A bystander's gaps grow
with all that runs on the machine; these numbers do not.
"""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import mmap
import os
import struct
import time
from pathlib import Path
from typing import NamedTuple

from aioengine.__main__ import run
from aioengine.cli import loop as cli_loop

INTERVAL = 0.005
"""Seconds between two beats."""
FILE = "AIOENGINE_HELD"
STACKS = "AIOENGINE_HELD_STACKS"
"""File to which all threads' stacks are written during a long hold, if it is set."""
LONG = 0.2
"""Seconds between two beats that are a long hold."""
_NUMBERS = struct.Struct("ddd")


class Hold(NamedTuple):
    """Seconds between two beats at most, beyond their interval."""

    busy: float
    """Processor time of the loop's thread."""
    blocked: float
    """Time in which it neither ran nor waited for a processor: another thread had the interpreter, or it read
    a file."""
    frozen: float
    """How many objects its garbage collector leaves alone: those of the engine and its libraries."""


class Held:
    """The longest holds of a server's loop since the last look."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(_NUMBERS.size))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _NUMBERS.size)

    def take(self) -> Hold:
        found = Hold(*_NUMBERS.unpack(self._map[:]))
        self._map[:] = bytes(_NUMBERS.size)
        return found


def _beat_on(loop: asyncio.AbstractEventLoop, path: str) -> None:
    with open(path, "r+b") as file:
        map_ = mmap.mmap(file.fileno(), _NUMBERS.size)
    stacks = os.open(os.environ[STACKS], os.O_CREAT | os.O_WRONLY) if STACKS in os.environ else None

    def now() -> tuple[float, float, float]:
        with open("/proc/thread-self/schedstat") as file:
            waited = int(file.read().split()[1]) / 1e9
        return time.monotonic(), time.thread_time(), waited

    last = now()

    def beat() -> None:
        nonlocal last
        if stacks is not None:
            faulthandler.dump_traceback_later(LONG, file=stacks)  # needs no interpreter lock
        time_, ran, waited = now()
        busy = ran - last[1]
        blocked = time_ - last[0] - busy - (waited - last[2])
        last = time_, ran, waited
        before = _NUMBERS.unpack(map_[:])
        frozen = before[2] or gc.get_freeze_count()  # which counts them one by one
        map_[:] = _NUMBERS.pack(max(before[0], busy - INTERVAL), max(before[1], blocked - INTERVAL), frozen)
        loop.call_later(INTERVAL, beat)

    loop.call_soon(beat)


def _watched_loop() -> asyncio.AbstractEventLoop:
    loop = _new_loop()
    if FILE in os.environ:
        _beat_on(loop, os.environ[FILE])
    return loop


_new_loop = cli_loop._uvloop

if __name__ == "__main__":
    cli_loop._uvloop = _watched_loop
    run()
