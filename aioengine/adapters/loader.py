"""Moves adapters disk -> CPU -> slot off the event loop, while the model keeps stepping."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, TypeVar

from aioengine.adapters.read_threads import ReadThreads
from aioengine.adapters.retry import Backoff, Retrying
from aioengine.adapters.store import AdapterStore
from aioengine.errors import AdapterLoadError

if TYPE_CHECKING:
    from aioengine.model.slots.image import AdapterImage

MAX_HANGING = 16
"""While so many reads hang that were given up, no further one is started: each keeps a thread."""
GRACE_SECONDS = 0.5
POLL_SECONDS = 0.005
"""Such waiting is rare, and not worth being told by threads and processes."""
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


class ReadAdapter(Protocol):
    """What a read delivers."""

    @property
    def rank(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def digest(self) -> str: ...


R = TypeVar("R", bound=ReadAdapter)


class BaseLoader(ABC, Generic[R]):
    """Loads with retries and a time limit, wherever the reads are done. How many adapters are loaded at once
    is the caller's to bound.

    Args:
        retries: How often a read that failed for a passing reason is tried again, after ``backoff``
            seconds, then twice as long, and so on. No thread is held meanwhile.
        timeout: Seconds that a load may take, retries and all; None for ever. A read that does not
            return is left behind: it counts no more, and what it may still deliver is dropped.
        grace: Seconds that the next read waits while so many were given up that no further one may start.
            Those that were only cancelled have returned by then.
    """

    def __init__(
        self,
        *,
        retries: int = 0,
        backoff: float = 0.1,
        timeout: float | None = None,
        seed: int = 0,
        grace: float = GRACE_SECONDS,
    ) -> None:
        self._backoff = Backoff(retries, backoff, seed=seed)
        self._timeout = timeout
        self._grace = grace

    async def load(self, uid: int, name: str, path: str, retrying: Retrying) -> LoadedAdapter:
        """Disk -> CPU cache. ``retrying`` is told before each further attempt.

        Raises the adapter errors of the format's reader; AdapterLoadError also if it takes too long, if
        too many earlier reads hang, or if there is no memory for it.
        """
        start = time.perf_counter()
        try:
            async with asyncio.timeout(self._timeout) as limit:
                found = await self._backoff.run(lambda: self._attempt(name, path), retrying)
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise AdapterLoadError(
                f"was not read within load_timeout={self._timeout:g} seconds: the disk or the network mount "
                "hangs or is too slow; see to it, or raise LoRAConfig.load_timeout",
                name=name,
                path=path,
            ) from error
        self._keep(uid, found)
        seconds = time.perf_counter() - start
        return LoadedAdapter(found.rank, found.nbytes, found.digest, seconds)

    async def _attempt(self, name: str, path: str) -> R:
        hanging, oldest = await self._those_that_stay()
        if hanging >= MAX_HANGING:
            raise AdapterLoadError(
                f"not read, because {hanging} earlier reads hang and each keeps a thread "
                f"(the oldest is of {oldest}); loads go on when one of them "
                "returns: see to the disk or the network mount",
                name=name,
                path=path,
            )
        return await self._read(name, path)

    async def _those_that_stay(self) -> tuple[int, str]:
        """The reads that hang, as soon as there is room for another, or when ``grace`` has passed."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self._grace
        hanging = self._hanging()
        while hanging[0] >= MAX_HANGING and loop.time() < end:
            await asyncio.sleep(POLL_SECONDS)
            hanging = self._hanging()
        return hanging

    @abstractmethod
    async def _read(self, name: str, path: str) -> R:
        """One attempt. If it is cancelled, nothing may be left of what it delivers later."""

    @abstractmethod
    def _keep(self, uid: int, found: R) -> None:
        """Into the CPU cache."""

    @abstractmethod
    def _hanging(self) -> tuple[int, str]:
        """How many reads were given up and have not returned, and what the oldest reads."""


class AdapterLoader(BaseLoader["AdapterImage"]):
    """Reads run in threads of their own, so that a slow disk holds up neither the event loop nor a model
    step. The arguments are those of :class:`BaseLoader`."""

    def __init__(
        self,
        store: AdapterStore,
        writer: SlotWriter,
        *,
        retries: int = 0,
        backoff: float = 0.1,
        timeout: float | None = None,
        seed: int = 0,
        grace: float = GRACE_SECONDS,
    ) -> None:
        super().__init__(retries=retries, backoff=backoff, timeout=timeout, seed=seed, grace=grace)
        self.store = store
        self._writer = writer
        self._threads = ReadThreads("aioengine-load")

    async def _read(self, name: str, path: str) -> AdapterImage:
        try:
            return await self._threads.run(path, lambda: self.store.read(name, path))
        except (MemoryError, RuntimeError) as error:
            if (known := out_of_memory(error, name, path)) is None:
                raise
            raise known from error

    def _keep(self, uid: int, found: AdapterImage) -> None:
        self.store.put(uid, found)

    def _hanging(self) -> tuple[int, str]:
        return self._threads.abandoned, self._threads.oldest_abandoned

    async def place(self, uid: int, slot: int) -> float:
        """CPU cache -> slot; returns the seconds that the copy took."""
        return await self._writer.write_slot(slot, self.store.get(uid))

    def drop(self, uid: int) -> None:
        """Free an adapter's CPU memory."""
        self.store.drop(uid)

    async def close(self) -> None:
        """Wait for the reads under way, but not for those that hang, and free the cache. Cancel loads
        before."""
        await self._threads.wait(STOP_SECONDS)
        self.store.clear()


def out_of_memory(error: BaseException, name: str, path: str) -> AdapterLoadError | None:
    """What to raise for it, if it says that there is no memory."""
    if not _is_out_of_memory(error):
        return None
    return AdapterLoadError(
        "there is not enough memory to hold it; lower LoRAConfig.max_cpu_loras or set "
        f"max_cpu_lora_bytes ({type(error).__name__}: {str(error)[:200]})",
        name=name,
        path=path,
    )


def _is_out_of_memory(error: BaseException) -> bool:
    """torch raises RuntimeError from its CPU allocator, and a class of its own from CUDA's."""
    text = str(error).lower()
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(words in text for words in ("can't allocate memory", "not enough memory", "out of memory"))
    )
