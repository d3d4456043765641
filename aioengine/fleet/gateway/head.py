"""Ray's head: a gateway notices that it does not answer, before Ray ends this process because of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from aioengine.errors import EngineDead
from aioengine.executors.ray.address import refusal

_SILENCE = ("UNAVAILABLE", "DEADLINE_EXCEEDED")
"""gRPC's words where nothing answers. A head that refuses, such as a token that was changed, lives."""
WATCH_SECONDS = 2.0
LOST_SECONDS = 15.0
"""How long nothing has to answer at the head's address until new requests are refused. After 60 s Ray ends
every process that is connected, without a word to it."""
FINISH_SECONDS = 25.0
"""How long accepted requests may then go on: replicas and their streams do not need the head."""


class Head:
    """Ray's head at ``address`` ("host:port")."""

    def __init__(self, address: str) -> None:
        self._address = address
        self.failure: EngineDead | None = None
        """Set while it does not answer."""

    async def until_lost(self) -> EngineDead:
        """Watch it until nothing has answered at its address for ``LOST_SECONDS``; then :attr:`failure` is
        set, and returned."""
        loop = asyncio.get_running_loop()
        heard = loop.time()
        while loop.time() - heard < LOST_SECONDS:
            await asyncio.sleep(WATCH_SECONDS)
            if await self.answers():
                heard = loop.time()
        self.failure = EngineDead(
            f"Ray's head at {self._address} does not answer, and without it Ray ends this server; start Ray "
            "and the server again"
        )
        return self.failure

    async def is_back(self, while_needed: Callable[[], bool]) -> bool:
        """Wait until it answers again, or ``while_needed()`` is false, at most ``FINISH_SECONDS``. Returns
        whether it answers."""
        loop = asyncio.get_running_loop()
        end = loop.time() + FINISH_SECONDS
        while while_needed() and loop.time() < end:
            if await self.answers():
                return True
            await asyncio.sleep(WATCH_SECONDS)
        return await self.answers()

    async def answers(self) -> bool:
        """Return whether a server answers at its address; then there is no :attr:`failure` any more."""
        why = await asyncio.to_thread(refusal, self._address, WATCH_SECONDS)
        if why is not None and why.startswith(_SILENCE):
            return False
        self.failure = None
        return True
