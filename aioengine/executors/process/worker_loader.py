"""Loads adapters into the workers' memory. Each rank reads and holds its share; either all ranks hold an
adapter, or none does."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from threading import Event
from typing import TYPE_CHECKING, Any

from aioengine.adapters.loader import STOP_SECONDS, BaseLoader, Patience
from aioengine.adapters.peft.digest import ContentDigest, content_digest
from aioengine.adapters.read_threads import Progress, ReadThreads
from aioengine.errors import AdapterLoadError
from aioengine.executors.process.wire import Add, Discard, Finish, Keep, Read, ReadDone
from aioengine.step import AdapterSource, LoadedAdapter

if TYPE_CHECKING:
    from aioengine.executors.process.workers import Call, Workers

ADD_BYTES = 256 << 10
"""Size of the pieces in which the ranks' sums are sent, so that the loop stays free."""


class WorkerLoader(BaseLoader[int]):
    """Loads adapters through ``workers``, which read them beside the steps, each under a number.

    With several ranks, no rank reads the whole file, so the digest is computed here, in a thread.
    """

    workers: Workers

    def __init__(self, patience: Patience) -> None:
        super().__init__(patience)
        self._digests = ReadThreads("aioengine-digest")

    async def _read(
        self, name: str, path: str, progress: Progress, files: AdapterSource | None
    ) -> tuple[LoadedAdapter, int]:
        def ended(_: object) -> None:
            progress.running = False

        workers = self.workers
        reading = workers.ask(Read(name, path, files), ReadDone)
        reading.moved = progress.moved
        last: Call[Any] = reading
        try:
            answers, content = await self._read_and_digest(reading, name, path, workers.size, files)
            first = answers[0]
            if any((a.rank, a.version) != (first.rank, content.version) for a in answers):
                raise AdapterLoadError(
                    "its files changed while the ranks read them", name=name, path=path, transient=True
                )
            if first.squares:
                await _add(workers, reading.number, [answer.squares for answer in answers])
                last = workers.ask(Finish(reading.number), type(None))
                await last
        except BaseException:
            workers.tell(Discard(reading.number))
            raise
        finally:
            if last.ended.done():
                progress.running = False
            else:  # it was given up, and goes on in a worker
                last.ended.add_done_callback(ended)
        found = LoadedAdapter(
            first.rank,
            sum(answer.nbytes for answer in answers),
            content.digest,
            labels=first.labels,
            slot_nbytes=max(answer.slot_nbytes for answer in answers),
            invocation=first.invocation,
            scalable=all(answer.scalable for answer in answers),
        )
        return found, reading.number

    async def _read_and_digest(
        self, reading: Call[ReadDone], name: str, path: str, size: int, files: AdapterSource | None
    ) -> tuple[list[ReadDone], ContentDigest]:
        """Read and compute the digest at the same time. Raises the first error of the two."""
        if size == 1:
            answers = await reading
            return answers, ContentDigest(answers[0].digest, answers[0].version)
        unwanted = Event()
        both = (
            asyncio.ensure_future(reading),
            asyncio.ensure_future(self._digests.run(lambda: content_digest(name, path, unwanted, files))),
        )
        try:
            return await asyncio.gather(*both)
        finally:
            unwanted.set()
            for task in both:
                task.cancel()

    def _keep(self, uid: int, content: int) -> None:
        self.workers.tell(Keep(content, uid))

    async def close(self) -> None:
        """Close the loader. The workers free their memory when they exit."""
        await self._digests.wait(STOP_SECONDS)


async def _add(workers: Workers, number: int, squares: Sequence[bytes]) -> None:
    """Let every rank add up the sums of all ranks."""
    for part in squares:
        for begin in range(0, len(part), ADD_BYTES):
            workers.tell(Add(number, begin, part[begin : begin + ADD_BYTES]))
            await workers.flush()
