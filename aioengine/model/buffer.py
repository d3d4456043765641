"""Large pieces of CPU memory, on huge pages, so that the first access is cheap."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable
from contextlib import suppress

import torch

_HUGE_PAGE = 2 << 20
_LINE = 64
_ARENA_BYTES = 256 << 20
CPU = torch.device("cpu")

Allocate = Callable[[int], torch.Tensor]
"""Function that returns a uint8 tensor of a number of bytes (> 0). Its memory is freed when no tensor refers
to it any more."""


class Buffer:
    """Memory for ``nbytes`` > 0 bytes, as a uint8 tensor and, to read into it and hash it, as a view.

    A mapping of its own, all of which goes back to the system with the last tensor; anonymous, so that nobody
    can truncate it. In huge pages where it fills them: touching new memory in small ones takes longer than
    reading a file into it.
    """

    def __init__(self, nbytes: int) -> None:
        huge = -(-nbytes // _HUGE_PAGE) * _HUGE_PAGE
        huge = huge if huge - nbytes <= nbytes // 8 else nbytes // _HUGE_PAGE * _HUGE_PAGE
        self.nbytes = max(nbytes, huge)
        """Size in bytes, rounded up to whole huge pages where that adds little."""
        offset = 0
        if sys.platform == "linux":
            # Longer, to begin at a huge page; only what is used of it becomes memory.
            mapping = _anonymous(self.nbytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            offset = -torch.frombuffer(mapping, dtype=torch.uint8).data_ptr() % _HUGE_PAGE
            if huge:
                with suppress(OSError):  # a kernel without huge pages
                    mapping.madvise(mmap.MADV_HUGEPAGE, offset, huge)
        else:
            mapping = _anonymous(nbytes)
        self.tensor = torch.frombuffer(mapping, dtype=torch.uint8, offset=offset, count=nbytes)
        self.view = memoryview(mapping)[offset : offset + nbytes]


def pageable(nbytes: int) -> torch.Tensor:
    """Return memory for ``nbytes`` > 0 bytes: an :data:`Allocate`."""
    return Buffer(nbytes).tensor


def page_locked(device: torch.device) -> Allocate:
    """Return an :data:`Allocate` of memory from which this GPU copies by itself. torch keeps what is freed
    for the next adapters, and rounds sizes up to powers of two."""

    def allocate(nbytes: int) -> torch.Tensor:
        # A new thread's device is the first one, where this process may have no business.
        with torch.cuda.device(device):
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    return allocate


def _anonymous(nbytes: int, **options: int) -> mmap.mmap:
    try:
        return mmap.mmap(-1, nbytes, **options)
    except OSError as error:
        raise MemoryError(f"{nbytes} bytes: {error.strerror}") from error


class Arena:
    """Tensors that follow each other in large buffers, each of which lives as long as any of its own.

    What every step reads is best in huge pages, or the processor looks up where tens of thousands of small
    ones are. On a GPU each tensor has memory of its own.
    """

    def __init__(self, device: torch.device = CPU) -> None:
        self._device = device
        self._rest = torch.empty(0, dtype=torch.uint8)

    def take(self, nbytes: int) -> torch.Tensor:
        """Return the next ``nbytes`` (> 0) as uint8, aligned to a cache line; they are zero until written."""
        if self._device.type != "cpu":
            return torch.zeros(nbytes, dtype=torch.uint8, device=self._device)
        if nbytes > len(self._rest):
            # Only what is used of it becomes memory.
            self._rest = Buffer(max(nbytes, _ARENA_BYTES)).tensor
        taken, self._rest = self._rest[:nbytes], self._rest[-(-nbytes // _LINE) * _LINE :]
        return taken
