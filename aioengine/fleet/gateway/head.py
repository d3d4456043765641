"""Ray's head: a gateway notices that it does not answer, before Ray ends this process because of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from aioengine.errors import EngineDead
from aioengine.executors.ray.address import refusal

logger = logging.getLogger("aioengine.fleet")

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
        """Set while nothing has answered there for ``LOST_SECONDS``."""

    async def until_lost(self, needed: Callable[[], bool]) -> EngineDead:
        """Watch it, and return its :attr:`failure` when this gateway is not ``needed()`` any more, or
        ``FINISH_SECONDS`` after it began. If it answers again before, it is watched on."""
        loop = asyncio.get_running_loop()
        heard = loop.time()
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            if await self.answers():
                if self.failure is not None:
                    logger.warning("Ray's head answers again")
                heard, self.failure = loop.time(), None
                continue
            silent = loop.time() - heard
            if self.failure is not None and (silent >= LOST_SECONDS + FINISH_SECONDS or not needed()):
                return self.failure
            if self.failure is None and silent >= LOST_SECONDS:
                self.failure = EngineDead(
                    f"Ray's head at {self._address} does not answer, and without it Ray ends this server; "
                    "start Ray and the server again"
                )
                logger.error("%s; accepted requests may finish", self.failure)

    async def answers(self) -> bool:
        """Return whether a server answers at its address."""
        why = await asyncio.to_thread(refusal, self._address, WATCH_SECONDS)
        return why is None or not why.startswith(_SILENCE)
