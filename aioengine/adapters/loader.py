"""Loads adapters from disk into the CPU cache off the event loop, while the model keeps stepping."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator

from aioengine.adapters.peft.folder import failed, naming
from aioengine.adapters.read_threads import Progress
from aioengine.config import LoRAConfig
from aioengine.errors import AdapterError, AdapterLoadError
from aioengine.step import LoadedAdapter, ReadOrder, Stalled

STALL_SECONDS = 1.0
"""After a read has waited this long for one file operation, or for its next retry, another read may start in
its place."""
IMPATIENT_SECONDS = 0.1
"""The same limit while another read hangs: hanging reads come in groups, and each would delay the rest."""
MAX_HANGING = 64
"""Maximum number of hanging reads; each keeps a thread, so no read is started beyond it."""
MAX_HANGING_IN_FOLDER = 32
"""Maximum number of hanging reads of folders that are in one folder, as those of one mount often are."""
GRACE_SECONDS = 0.5
"""How long the next read waits for abandoned reads that are in its way. Those that do not hang end within
this time."""
BACKOFF_SECONDS = 0.1
"""Wait before the first retry of a read that failed for a passing reason."""
POLL_SECONDS = 0.005
"""Interval of polling, which is rare."""


class BaseLoader(ABC):
    """Loads with the retries and the time limit of ``lora``, wherever the reads are done. No thread is held
    between retries. A read that does not return in time is abandoned: it is not counted any more, and its
    result is dropped. The caller bounds how many adapters are loaded at once."""

    def __init__(self, lora: LoRAConfig | None = None, seed: int = 0) -> None:
        lora = LoRAConfig() if lora is None else lora
        self._retries, self._timeout = lora.load_retries, lora.load_timeout
        self._rng = random.Random(seed)
        self._open: list[Progress] = []
        """Reads that may still run."""

    async def load(self, order: ReadOrder) -> LoadedAdapter:
        """Read an adapter from disk, or from ``order.files``, into the CPU cache.

        Raises the adapter errors of the format's reader; AdapterLoadError also if it takes too long, if an
        earlier read of this folder or too many others hang, or if there is no memory for it.
        """
        start = time.perf_counter()
        progress = Progress(order.path)
        self._watch(progress, order.stalled)
        with naming(order.name, order.path):
            try:
                async with asyncio.timeout(self._timeout) as limit:
                    await self._until_unobstructed(order.path)
                    found = await self._attempts(order, progress)
            except TimeoutError:
                if not limit.expired():
                    raise
                progress.stuck = True
                failed(
                    f"was not read within load_timeout={self._timeout:g} seconds: the disk or the network "
                    "mount hangs or is too slow; repair it, or raise LoRAConfig.load_timeout"
                )
            finally:
                progress.over = True
        return found._replace(seconds=time.perf_counter() - start)

    async def _attempts(self, order: ReadOrder, progress: Progress) -> LoadedAdapter:
        """Read until it succeeds. Raises the AdapterError of a permanent failure, or of the last retry.

        The waits double, each times a random 0.5 to 1, so that readers of one disk do not come back all at
        once ("equal jitter": Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015). The
        same seed gives the same waits."""
        attempts = 0
        while True:
            progress.running = progress.waiting = True
            if progress not in self._open:
                self._open.append(progress)
            try:
                return await self._read(order, progress)
            except Exception as error:
                progress.running = False
                attempts += 1
                if not isinstance(error, AdapterError) or not error.transient or not self._retries:
                    raise
                if attempts > self._retries:
                    why = f"{error.reason} ({attempts} attempts, the last just now)"
                    raise type(error)(why, name=error.name, path=error.path, transient=True) from error
            await asyncio.sleep(BACKOFF_SECONDS * 2 ** (attempts - 1) * self._rng.uniform(0.5, 1.0))

    # Reads that hang

    async def _until_unobstructed(self, path: str) -> None:
        """Wait for abandoned reads. Raises AdapterLoadError if they still hang after
        ``GRACE_SECONDS``, or others hang."""
        loop = asyncio.get_running_loop()
        end = loop.time() + GRACE_SECONDS
        while (reason := self._obstacle(path, abandoned=True)) is not None:
            if loop.time() >= end or self._obstacle(path) is not None:
                failed(
                    f"not read, because {reason}; it is read again when that has ended: check the disk or "
                    "the network mount",
                    transient=True,
                )
            await asyncio.sleep(POLL_SECONDS)

    async def _end_of_reads(self, seconds: float) -> None:
        """Wait up to ``seconds`` until no read runs."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while any(read.running for read in self._open):
            if loop.time() >= end:
                return
            await asyncio.sleep(POLL_SECONDS)

    def _obstacle(self, path: str, *, abandoned: bool = False) -> str | None:
        """Return why no read of this folder may start while others hang or, on demand, only run on although
        they were ``abandoned``; None if it may."""
        self._open = [read for read in self._open if read.running]
        hanging = [read.path for read in self._open if read.stuck or (abandoned and read.over)]
        if path in hanging:
            return "an earlier read of this folder hangs"
        if len(hanging) >= MAX_HANGING:
            return (
                f"{len(hanging)} earlier reads hang and each keeps a thread (the oldest is of {hanging[0]})"
            )
        parent = os.path.dirname(path)
        if (count := sum(os.path.dirname(other) == parent for other in hanging)) >= MAX_HANGING_IN_FOLDER:
            return f"{count} earlier reads of folders in {parent} hang"
        return None

    def _watch(self, progress: Progress, stalled: Stalled, calls: int = -1, told: bool = False) -> None:
        """Look again and again whether the read waits for too long, and call ``stalled`` once if it does. An
        abandoned read is watched until it ends. ``calls`` were there at the last look."""
        hangs = progress.running and progress.waiting and progress.calls == calls
        progress.stuck = progress.stuck or hangs
        if calls >= 0 and not (told or progress.over):
            told = hangs or not progress.running
            if told:
                stalled()
        if hangs or (progress.over and not progress.running):
            return
        impatient = any(read.stuck and read.running for read in self._open)
        seconds = IMPATIENT_SECONDS if impatient else STALL_SECONDS
        # Timers, and no task: an engine that stops leaves no task behind, however long a disk hangs.
        loop = asyncio.get_running_loop()
        loop.call_later(seconds, self._watch, progress, stalled, progress.calls, told)

    @abstractmethod
    async def _read(self, order: ReadOrder, progress: Progress) -> LoadedAdapter:
        """Read once into the CPU cache. Errors need not name the adapter.

        Record the end in ``progress``, even if the read was abandoned. After a cancellation, a late result
        must be dropped."""


@contextlib.contextmanager
def enough_memory() -> Iterator[None]:
    """Raise AdapterLoadError if memory runs out within. Torch raises RuntimeError then for the CPU, and a
    class of its own for CUDA."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text, kind = str(error), type(error).__name__
        words = ("can't allocate memory", "not enough memory", "out of memory")
        known = isinstance(error, MemoryError) or kind == "OutOfMemoryError"
        if not known and not any(part in text.lower() for part in words):
            raise
        why = "there is not enough memory to hold it; lower LoRAConfig.max_cpu_loras or set "
        why += f"LoRAConfig.max_cpu_lora_bytes ({kind}: {text[:200]})"
        raise AdapterLoadError(why, name="") from error
