"""Moves adapters disk -> CPU -> slot off the event loop, while the model keeps stepping."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, NamedTuple, Protocol

from aioengine.adapters.read_threads import ReadThreads
from aioengine.adapters.retry import Backoff, Retrying
from aioengine.adapters.store import AdapterStore
from aioengine.errors import AdapterLoadError

if TYPE_CHECKING:
    from aioengine.model.slot_image import AdapterImage

MAX_HANGING = 16
"""While so many reads hang that were given up, no further one is started: each keeps a thread."""
STOP_SECONDS = 1.0
"""How long ``close`` waits for reads that were not given up; they take milliseconds."""


class SlotWriter(Protocol):
    async def write_slot(self, slot: int, adapter: AdapterImage) -> float: ...


class LoadedAdapter(NamedTuple):
    """What the core needs to know of an adapter that has been read."""

    rank: int
    nbytes: int
    digest: str
    seconds: float


class AdapterLoader:
    """Reads run in threads of their own, so that a slow disk holds up neither the event loop nor a model
    step. How many adapters are loaded at once is the caller's to bound.

    Args:
        retries: How often a read that failed for a passing reason is tried again, after ``backoff``
            seconds, then twice as long, and so on. No thread is held meanwhile.
        timeout: Seconds that a load may take, retries and all; None for ever. A read that does not
            return is left behind: it counts no more, and what it may still deliver is dropped.
    """

    def __init__(
        self,
        store: AdapterStore,
        writer: SlotWriter,
        *,
        retries: int = 0,
        backoff: float = 0.1,
        timeout: float | None = None,
        seed: int = 0,
    ) -> None:
        self.store = store
        self._writer = writer
        self._backoff = Backoff(retries, backoff, seed=seed)
        self._timeout = timeout
        self._threads = ReadThreads("aioengine-load")

    async def load(self, uid: int, name: str, path: str, retrying: Retrying) -> LoadedAdapter:
        """Disk -> CPU cache. ``retrying`` is told before each further attempt.

        Raises the adapter errors of the format's reader; AdapterLoadError also if it takes too long, if
        too many earlier reads hang, or if there is no memory for it.
        """
        start = time.perf_counter()
        try:
            async with asyncio.timeout(self._timeout) as limit:
                packed = await self._backoff.run(lambda: self._read(name, path), retrying)
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise AdapterLoadError(
                f"was not read within load_timeout={self._timeout:g} seconds: the disk or the network mount "
                "hangs or is too slow; see to it, or raise LoRAConfig.load_timeout",
                name=name,
                path=path,
            ) from error
        self.store.put(uid, packed)
        seconds = time.perf_counter() - start
        return LoadedAdapter(packed.rank, packed.nbytes, packed.digest, seconds)

    async def _read(self, name: str, path: str) -> AdapterImage:
        if self._threads.abandoned >= MAX_HANGING:
            raise AdapterLoadError(
                f"not read, because {self._threads.abandoned} earlier reads hang and each keeps a thread "
                f"(the oldest is of {self._threads.oldest_abandoned}); loads go on when one of them "
                "returns: see to the disk or the network mount",
                name=name,
                path=path,
            )
        try:
            return await self._threads.run(path, lambda: self.store.read(name, path))
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            raise AdapterLoadError(
                "there is not enough memory to hold it; lower LoRAConfig.max_cpu_loras or set "
                f"max_cpu_lora_bytes ({type(error).__name__}: {str(error)[:200]})",
                name=name,
                path=path,
            ) from error

    async def place(self, uid: int, slot: int) -> float:
        """CPU cache -> slot; returns the seconds that the copy took."""
        return await self._writer.write_slot(slot, self.store.get(uid))

    def drop(self, uid: int) -> None:
        """Free an adapter's CPU memory."""
        self.store.drop(uid)

    async def close(self) -> None:
        """Wait for the reads under way, but not for those that hang. Cancel loads before."""
        await self._threads.wait(STOP_SECONDS)


def _is_out_of_memory(error: Exception) -> bool:
    """torch raises RuntimeError from its CPU allocator, and a class of its own from CUDA's."""
    text = str(error).lower()
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(words in text for words in ("can't allocate memory", "not enough memory", "out of memory"))
    )
