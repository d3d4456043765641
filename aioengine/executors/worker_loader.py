"""Adapters in the workers' memory: each rank reads and holds its share, and all of them do or none."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from aioengine.adapters.loader import BaseLoader
from aioengine.errors import AdapterLoadError
from aioengine.executors.wire import Discard, Done, Drop, Keep, Place, Read, ReadDone

if TYPE_CHECKING:
    from aioengine.executors.process import ProcessExecutor
    from aioengine.executors.workers import Call


class _Found(NamedTuple):
    """What all ranks have read. ``nbytes`` is the sum of their shares."""

    number: int
    rank: int
    nbytes: int
    digest: str


class WorkerLoader(BaseLoader[_Found]):
    """Moves adapters by asking the executor's workers; reads and copies run there, beside the steps.

    The arguments are those of :class:`~aioengine.adapters.loader.BaseLoader`.
    """

    def __init__(
        self,
        executor: ProcessExecutor,
        *,
        retries: int = 0,
        backoff: float = 0.1,
        timeout: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(retries=retries, backoff=backoff, timeout=timeout, seed=seed)
        self._executor = executor
        self._workers = executor.workers
        self._given_up: dict[Call, str] = {}
        """Reads that nobody waits for and that have not ended in every worker, and what they read."""

    async def _read(self, name: str, path: str) -> _Found:
        workers = self._executor.workers
        call = workers.ask(lambda number: Read(number, name, path))
        try:
            answers = await call.of(ReadDone)
            first = answers[0]
            if any((a.rank, a.digest) != (first.rank, first.digest) for a in answers):
                raise AdapterLoadError(
                    "its files changed while the ranks read them", name=name, path=path, transient=True
                )
        except BaseException:
            workers.tell(Discard(call.number))
            if call.open and workers.dead is None:
                self._given_up[call] = path
                call.all_answered = lambda: self._ended(call)
            raise
        return _Found(call.number, first.rank, sum(a.nbytes for a in answers), first.digest)

    def _ended(self, call: Call) -> None:
        self._given_up.pop(call, None)

    def _keep(self, uid: int, found: _Found) -> None:
        self._executor.workers.tell(Keep(found.number, uid))

    def _hanging(self) -> tuple[int, str]:
        if self._workers is not self._executor.workers:  # those that hung are gone with their processes
            self._given_up.clear()
            self._workers = self._executor.workers
        return len(self._given_up), next(iter(self._given_up.values()), "")

    async def place(self, uid: int, slot: int) -> float:
        """CPU cache -> slot, on all ranks; returns the seconds that the slowest copy took."""
        call = self._executor.workers.ask(lambda number: Place(number, uid, slot), patient=True)
        return max(done.seconds for done in await call.of(Done))

    def drop(self, uid: int) -> None:
        """Free an adapter's CPU memory."""
        self._executor.workers.tell(Drop(uid))

    async def close(self) -> None:
        """The workers take what they hold with them."""
