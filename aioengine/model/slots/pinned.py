"""Page-locked memory for the adapters in the CPU cache, from which a GPU copies by itself."""

from __future__ import annotations

import ctypes
import logging
import threading
import weakref
from collections import deque
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aioengine.model.buffer import Buffer

logger = logging.getLogger("aioengine")

SLAB_BYTES = 256 << 20
"""Bytes of a slab. It has room for as many adapters of one size as fit, or for one that is larger."""
FIRST_SLAB_BYTES = 1 << 30
"""Maximum bytes that are page-locked when an engine starts."""
_ALIGNMENT = 256
_PORTABLE = 1  # cudaHostRegisterPortable: for all devices


class _Piece(NamedTuple):
    begin: int
    nbytes: int


class PinnedSlabs:
    """An :data:`~aioengine.model.buffer.Allocate` of page-locked memory for ``device``.

    torch's own page-locked memory rounds sizes up to powers of two and is never given back, and the driver
    holds up launches while it locks pages. So memory is locked in slabs, of which the first, ``first_bytes``
    long, is there from the beginning, and adapters follow each other in them (first fit). A slab that becomes
    empty is unlocked when the next memory is asked for, except for the first.

    It may be called in any thread. Where memory cannot be locked (a container's limit), it warns once and
    gives ordinary memory: copies then take longer.
    """

    def __init__(self, device: torch.device, first_bytes: int = 0) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._freed: deque[tuple[_Slab, _Piece]] = deque()
        """Pieces that nobody refers to any more. The interpreter may find that out anywhere, also in a thread
        that has the lock."""
        self._slabs: list[_Slab] = []
        self._warned = False
        if first_bytes:
            self._slabs.append(self._slab(first_bytes))
        self._kept = len(self._slabs)

    @property
    def nbytes(self) -> int:
        """Bytes of all slabs."""
        return sum(slab.nbytes for slab in self._slabs)

    def __call__(self, nbytes: int) -> Tensor:
        size = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        with self._lock:
            self._collect()
            for slab in self._slabs:
                if (begin := slab.take(size)) is not None:
                    break
            else:
                slab = self._slab(size * max(1, SLAB_BYTES // size))
                self._slabs.append(slab)
                begin = slab.take(size)
                assert begin is not None
        # Tensors made of it keep this object alive, views of them as well.
        memory = slab.memory(begin, nbytes)
        weakref.finalize(memory, self._freed.append, (slab, _Piece(begin, size))).atexit = False
        return torch.frombuffer(memory, dtype=torch.uint8)

    def _slab(self, nbytes: int) -> _Slab:
        slab = _Slab(nbytes)
        if not slab.lock(self._device) and not self._warned:
            self._warned = True
            logger.warning(
                "%d bytes of host memory cannot be page-locked, so adapters are copied to the GPU more "
                "slowly; raise the limit of locked memory (ulimit -l)",
                nbytes,
            )
        return slab

    def _collect(self) -> None:
        while self._freed:
            slab, piece = self._freed.popleft()
            slab.give_back(piece)
        kept, rest = self._slabs[: self._kept], self._slabs[self._kept :]
        self._slabs = [*kept, *(slab for slab in rest if not slab.is_empty)]


class _Slab:
    """Memory that is locked as a whole, and which of it is free. It is unlocked before it is freed."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._buffer = Buffer(nbytes)
        self._free = [_Piece(0, nbytes)]
        """Free ranges in order, with gaps between them."""

    @property
    def is_empty(self) -> bool:
        return self._free == [(0, self.nbytes)]

    def lock(self, device: torch.device) -> bool:
        """Lock it, and return whether that was possible."""
        with torch.cuda.device(device):
            address = self._buffer.tensor.data_ptr()
            runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call] # torch has no types for it
            if int(runtime.cudaHostRegister(address, self.nbytes, _PORTABLE)) != 0:
                # The thread's next launch would report the error once more.
                with suppress(RuntimeError):
                    torch.zeros(1, device=device)
                return False
        # At the end of the process the driver may be gone already.
        weakref.finalize(self, _unlock, self._buffer, device).atexit = False
        return True

    def memory(self, begin: int, nbytes: int) -> ctypes.Array[ctypes.c_uint8]:
        return (ctypes.c_uint8 * nbytes).from_buffer(self._buffer.view, begin)

    def take(self, nbytes: int) -> int | None:
        """Take the first free bytes of this length and return where they begin; None if there are none."""
        for place, (begin, free) in enumerate(self._free):
            if free >= nbytes:
                rest = [_Piece(begin + nbytes, free - nbytes)] if free > nbytes else []
                self._free[place : place + 1] = rest
                return begin
        return None

    def give_back(self, piece: _Piece) -> None:
        joined: list[_Piece] = []
        for begin, nbytes in sorted([*self._free, piece]):
            if joined and sum(joined[-1]) == begin:
                joined[-1] = _Piece(joined[-1].begin, joined[-1].nbytes + nbytes)
            else:
                joined.append(_Piece(begin, nbytes))
        self._free = joined


def _unlock(buffer: Buffer, device: torch.device) -> None:
    with torch.cuda.device(device):
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call] # torch has no types for it
        runtime.cudaHostUnregister(buffer.tensor.data_ptr())
