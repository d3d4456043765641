"""The gateway's side of the channel to one replica: one long stream of frames comes in, batches of orders go
out."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from itertools import count
from typing import Any

import msgspec

from aioengine.fleet.gateway.call import Call
from aioengine.fleet.wire import ChannelName, Frame, Order, decode_frame, encode_order, encode_orders

_numbers = count(1)
"""Numbers of this process's channels: a later one has a higher one."""


class Channel:
    """A channel, which begins at once. ``frame(channel, frame)`` is called for each frame, and
    ``lost(channel, why)`` once when the replica is lost; neither after :meth:`close`.

    ``handle`` is Serve's, of the deployment of replicas.
    """

    def __init__(
        self,
        handle: Any,
        replica: str,
        gateway: str,
        *,
        frame: Callable[[Channel, Frame], None],
        lost: Callable[[Channel, str], None],
    ) -> None:
        self.replica = replica
        self.calls: dict[int, Call] = {}
        """Calls that run on the replica, by key."""
        self.quiet = 0
        """Looks since the last frame; see :meth:`look`."""
        self.sending = 0
        """Looks since orders were sent that have not arrived."""
        self.leaving = False
        """Whether Serve has removed the replica. Then it gets no new calls, and is closed when its calls have
        ended."""
        self._handle = handle
        self._name = ChannelName(gateway, next(_numbers))
        self._frame = frame
        self._lost = lost
        self._orders: list[msgspec.Raw] = []
        self._wake = asyncio.Event()
        self._stream: Any = None
        self._on_the_way = self._closed = False
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(self._guarded(self._read), name=f"aioengine-channel-{replica}"),
            loop.create_task(self._guarded(self._send), name=f"aioengine-orders-{replica}"),
        ]

    def send(self, order: Order) -> None:
        """Send an order with the next batch; orders keep their sequence. Raises what
        :func:`~aioengine.fleet.wire.encode_order` raises: now, and not when others are in the same batch."""
        self._orders.append(encode_order(order))
        self._wake.set()

    def look(self) -> None:
        """Count a look of the gateway, which looks at regular times. Time counts in looks, because while the
        gateway's process stands still, it does not look, and what came meanwhile is read before the next."""
        self.quiet += 1
        self.sending += self._on_the_way

    def close(self) -> None:
        """Stop listening. The replica then aborts this gateway's requests."""
        self._closed = True
        if self._stream is not None:
            with suppress(Exception):
                self._stream.cancel()
        for task in self._tasks:
            task.cancel()

    async def ended(self) -> None:
        """Wait until the channel's tasks have ended, after :meth:`close`."""
        await asyncio.wait(self._tasks)

    async def _guarded(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
            why = "its channel ended"
        except asyncio.CancelledError:
            raise
        except Exception as error:  # Ray's errors of all kinds mean the same here: the replica is lost
            why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if not self._closed:
            self._closed = True
            self._lost(self, why)

    async def _read(self) -> None:
        call = self._handle.options(stream=True, method_name="channel")
        self._stream = call.remote(self._name, to=self.replica)
        async for data in self._stream:
            self.quiet = 0
            frame = decode_frame(data)
            if frame.hello is not None and frame.hello.replica != self.replica:
                raise LookupError(f"replica {frame.hello.replica} answered in its place")
            self._frame(self, frame)

    async def _send(self) -> None:
        submit = self._handle.options(method_name="submit")
        while True:
            await self._wake.wait()
            self._wake.clear()
            orders, self._orders = self._orders, []
            self.sending, self._on_the_way = 0, True
            await submit.remote(self._name, encode_orders(orders), to=self.replica)
            self.sending, self._on_the_way = 0, False
