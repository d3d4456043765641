"""A replica's side of the channels to doors: each door's requests, and their new output."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress

from aioengine.fleet.wire import ChannelName, Delta
from aioengine.tasks import end_tasks


class Outbox:
    """Gathers deltas until the channel takes them, so that all deltas of one step are in one frame."""

    def __init__(self, number: int = 0) -> None:
        self.number = number
        """Number of its channel among the door's."""
        self.replaced = False
        """Whether the door has opened a later channel."""
        self.received = 0
        """Number of requests from the door so far."""
        self.ended = 0
        self._deltas: list[Delta] = []
        self._filled = asyncio.Event()
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def begin(self, key: int, work: Coroutine[None, None, None]) -> None:
        """Run a request; ``work`` puts its deltas here."""
        self.received += 1
        task = self._tasks[key] = asyncio.get_running_loop().create_task(
            work, name=f"aioengine-request-{key}"
        )
        task.add_done_callback(lambda _: self._end(key))

    @property
    def busy(self) -> bool:
        """Whether a request of the door has not ended."""
        return bool(self._tasks)

    def abort(self, key: int) -> None:
        """Abort a request; does nothing if it has ended."""
        task = self._tasks.get(key)
        if task is not None:
            task.cancel()

    def put(self, delta: Delta) -> None:
        self._deltas.append(delta)
        self._filled.set()

    def wake(self) -> None:
        """Have the channel send a frame although there is no delta."""
        self._filled.set()

    def take(self) -> list[Delta]:
        self._filled.clear()
        deltas, self._deltas = self._deltas, []
        return deltas

    async def filled(self, seconds: float) -> None:
        """Wait until there is a delta, or :meth:`wake` is called, at most ``seconds``."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._filled.wait()

    async def close(self) -> None:
        """Abort all of the door's requests, and wait until they have ended."""
        await end_tasks(self._tasks.values())

    def _end(self, key: int) -> None:
        del self._tasks[key]
        self.ended += 1


class Outboxes:
    """The outboxes of a replica's doors, each of the door's latest channel. What belongs to an earlier one
    may come late; its requests run elsewhere then, or were sent again."""

    def __init__(self) -> None:
        self._by_door: dict[str, Outbox] = {}

    @asynccontextmanager
    async def opened(self, channel: str) -> AsyncIterator[Outbox]:
        """Give an outbox for a channel that begins, as soon as the requests of the door's earlier one have
        ended. Raises LookupError if the door has a later one."""
        door, number = ChannelName.of(channel)
        before = self._by_door.get(door)
        if before is not None and before.number > number:
            raise LookupError(f"channel {channel}: the door has a later one")
        box = self._by_door[door] = Outbox(number)
        try:
            if before is not None:
                before.replaced = True
                await before.close()
            yield box
        finally:
            if self._by_door.get(door) is box:
                del self._by_door[door]
            await box.close()

    def of(self, channel: str) -> Outbox:
        """Return the outbox of a channel. Raises LookupError if it is not the door's latest one."""
        door, number = ChannelName.of(channel)
        box = self._by_door.get(door)
        if box is None or box.number != number:
            raise LookupError(f"channel {channel}: the door has not opened it, or has a later one")
        return box

    def wake(self) -> None:
        """Have each channel send a frame."""
        for box in self._by_door.values():
            box.wake()

    async def close(self) -> None:
        for box in list(self._by_door.values()):
            await box.close()
