"""Shared memory between the engine and the children: places for masks."""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
import threading


class Places:
    """``count`` places of ``width`` bytes each. A place belongs to one child until the child has answered or
    ended, because late masks are still written."""

    def __init__(self, count: int, width: int) -> None:
        self.width = width
        self.size = count * width
        self.file = _file(self.size)
        self._memory = mmap.mmap(self.file, self.size)
        self._free = list(range(count))
        self._lock = threading.Lock()

    def take(self) -> int | None:
        """Take a place; None if none is free."""
        with self._lock:
            return self._free.pop() if self._free else None

    def give_back(self, place: int) -> None:
        with self._lock:
            self._free.append(place)

    def read(self, place: int, count: int) -> bytes:
        begin = place * self.width
        return self._memory[begin : begin + count]

    def close(self) -> None:
        """Close the memory; masks that were read stay valid."""
        os.close(self.file)
        self._memory.close()


def _file(size: int) -> int:
    """Open a file without a name, and return its descriptor."""
    if sys.platform == "linux":
        file = os.memfd_create("aioengine-masks")
    else:
        file, path = tempfile.mkstemp(prefix="aioengine-")
        os.unlink(path)
    os.ftruncate(file, size)
    return file
