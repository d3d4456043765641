"""Shared memory between the engine and the children: places for masks."""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
import threading
from collections import Counter


class Places:
    """``count`` places of ``width`` bytes each. A place belongs to one child until the child has answered or
    ended, because late masks are still written. One tenant's may be half of what others leave, so that one
    that leaves many slow masks behind does not take the places of all."""

    def __init__(self, count: int, width: int) -> None:
        self.width = width
        self.size = count * width
        self.file = _file(self.size)
        self._memory = mmap.mmap(self.file, self.size)
        self._free = list(range(count))
        self._taken: dict[int, str | None] = {}
        self._of: Counter[str | None] = Counter()
        self._lock = threading.Lock()

    def take(self, tenant: str | None) -> int | None:
        """Take a place for a tenant; None if none is free for it."""
        with self._lock:
            if self._of[tenant] >= len(self._free):  # with its own: half of what others leave
                return None
            place = self._free.pop()
            self._taken[place] = tenant
            self._of[tenant] += 1
            return place

    def give_back(self, place: int) -> None:
        with self._lock:
            tenant = self._taken.pop(place)
            self._of[tenant] -= 1
            if not self._of[tenant]:
                del self._of[tenant]
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
