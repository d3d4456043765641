"""Moves adapters disk -> CPU -> slot off the event loop, while the model keeps stepping."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple, Protocol

from aioengine.adapters.store import AdapterStore

if TYPE_CHECKING:
    from aioengine.adapters.peft import PackedAdapter


class SlotWriter(Protocol):
    async def write_slot(self, slot: int, adapter: PackedAdapter) -> float: ...


class LoadedAdapter(NamedTuple):
    """What the core needs to know of an adapter that has been read."""

    rank: int
    nbytes: int
    digest: str
    seconds: float


class AdapterLoader:
    """Reads run in threads of their own, ``max_concurrent`` at once, so that a slow disk holds up
    neither the event loop nor a model step nor, up to that number, another adapter."""

    def __init__(self, store: AdapterStore, writer: SlotWriter, *, max_concurrent: int) -> None:
        self.store = store
        self._writer = writer
        self._threads = ThreadPoolExecutor(max_concurrent, thread_name_prefix="aioengine-load")

    async def load(self, uid: int, name: str, path: str) -> LoadedAdapter:
        """Disk -> CPU cache. Raises the adapter errors of the format's reader."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._read, uid, name, path)

    def _read(self, uid: int, name: str, path: str) -> LoadedAdapter:
        start = time.perf_counter()
        packed = self.store.read(uid, name, path)
        seconds = time.perf_counter() - start
        return LoadedAdapter(packed.rank, packed.nbytes, packed.digest, seconds)

    async def place(self, uid: int, slot: int) -> float:
        """CPU cache -> slot; returns the seconds that the copy took."""
        return await self._writer.write_slot(slot, self.store.get(uid))

    def drop(self, uid: int) -> None:
        """Free an adapter's CPU memory."""
        self.store.drop(uid)

    def close(self) -> None:
        """End the threads; call when no load is under way."""
        self._threads.shutdown(wait=True)
