"""Loads adapters into the workers' memory. Each rank reads and holds its share; either all ranks hold an
adapter, or none does."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import count
from threading import Event
from typing import Any

from aioengine.adapters.loader import STOP_SECONDS, BaseLoader, Patience
from aioengine.adapters.peft.digest import ContentDigest, content_digest
from aioengine.adapters.read_threads import Progress, ReadThreads
from aioengine.errors import AdapterLoadError
from aioengine.executors.process.wire import Add, Read, ReadDone, Settle
from aioengine.executors.process.workers import Workers
from aioengine.step import AdapterSource, LoadedAdapter

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
        self._numbers = count()

    async def _read(
        self, name: str, path: str, progress: Progress, files: AdapterSource | None
    ) -> tuple[LoadedAdapter, int]:
        def ended(_: object) -> None:
            progress.running = False

        workers, number = self.workers, next(self._numbers)
        reading = workers.ask(Read(number, name, path, files), ReadDone, progress.moved)
        last: asyncio.Future[Any] = reading
        try:
            answers, content = await self._read_and_digest(reading, name, path, files)
            shares = [answer.adapter for answer in answers]
            if any((a.adapter.rank, a.version) != (shares[0].rank, content.version) for a in answers):
                raise AdapterLoadError(
                    "its files changed while the ranks read them", name=name, path=path, transient=True
                )
            for part in _parts(number, [answer.squares for answer in answers]):
                last = workers.ask(part, type(None))
                await asyncio.shield(last)
        except BaseException:
            workers.tell(Settle(number))
            raise
        finally:
            last.add_done_callback(ended)  # one that was given up goes on in a worker
            progress.running = not last.done()
        found = shares[0]._replace(
            nbytes=sum(share.nbytes for share in shares),
            digest=content.digest,
            slot_nbytes=max(share.bytes_in_slot for share in shares),
            scalable=all(share.scalable for share in shares),
        )
        return found, number

    async def _read_and_digest(
        self, reading: asyncio.Future[list[ReadDone]], name: str, path: str, files: AdapterSource | None
    ) -> tuple[list[ReadDone], ContentDigest]:
        """Read and compute the digest at the same time. Raises the first error of the two."""
        if self.workers.size == 1:
            answers = await asyncio.shield(reading)
            return answers, ContentDigest(answers[0].adapter.digest, answers[0].version)
        unwanted = Event()
        digest = asyncio.ensure_future(self._digests.run(lambda: content_digest(name, path, unwanted, files)))
        try:
            return await asyncio.gather(asyncio.shield(reading), digest)
        finally:
            unwanted.set()
            digest.cancel()

    def _keep(self, uid: int, content: int) -> None:
        self.workers.tell(Settle(content, uid))

    async def close(self) -> None:
        """Close the loader. The workers free their memory when they exit."""
        await self._digests.wait(STOP_SECONDS)


def _parts(read: int, squares: Sequence[bytes]) -> list[Add]:
    """Return the orders by which every rank adds up the sums of all ranks."""
    places = [(rank, begin) for rank, part in enumerate(squares) for begin in range(0, len(part), ADD_BYTES)]
    return [
        Add(read, begin, squares[rank][begin : begin + ADD_BYTES], (rank, begin) == places[-1])
        for rank, begin in places
    ]
