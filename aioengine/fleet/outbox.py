"""A replica's side of the channels to gateways: each gateway's requests, and their new output."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress

from aioengine.fleet.wire import ChannelName, Delta
from aioengine.tasks import end_tasks


class Outbox:
    """Gathers deltas until the channel takes them, so that all deltas of one step are in one frame."""

    def __init__(self) -> None:
        self.replaced = False
        """Whether the gateway has opened a later channel."""
        self.received = 0
        """Number of requests from the gateway so far."""
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
        """Whether a request of the gateway has not ended."""
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
        """Abort all of the gateway's requests, and wait until they have ended."""
        await end_tasks(self._tasks.values())

    def _end(self, key: int) -> None:
        del self._tasks[key]
        self.ended += 1


class Outboxes:
    """The outboxes of a replica's gateways, each of the gateway's latest channel. What belongs to an earlier
    one may come late; its requests run elsewhere then, or were sent again."""

    def __init__(self) -> None:
        self._by_channel: dict[ChannelName, Outbox] = {}

    @asynccontextmanager
    async def opened(self, channel: ChannelName) -> AsyncIterator[Outbox]:
        """Give an outbox for a channel that begins, as soon as the requests of the gateway's earlier one have
        ended. Raises LookupError if the gateway has a later one."""
        others = [other for other in self._by_channel if other.gateway == channel.gateway]
        if any(other.number > channel.number for other in others):
            raise LookupError(f"{channel}: the gateway has a later one")
        before = [self._by_channel.pop(other) for other in others]
        box = self._by_channel[channel] = Outbox()
        try:
            for earlier in before:
                earlier.replaced = True
                await earlier.close()
            yield box
        finally:
            self._by_channel.pop(channel, None)
            await box.close()

    def of(self, channel: ChannelName) -> Outbox:
        """Return the outbox of a channel. Raises LookupError if it is not the gateway's latest one."""
        return self._by_channel[channel]

    def wake(self) -> None:
        """Have each channel send a frame."""
        for box in self._by_channel.values():
            box.wake()

    async def close(self) -> None:
        for box in list(self._by_channel.values()):
            await box.close()
