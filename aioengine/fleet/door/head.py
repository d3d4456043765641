"""Notices that Ray's head is gone, before Ray ends this process because of it."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable

from aioengine.errors import EngineDead

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
"""What a client of HTTP/2 says first, and an empty SETTINGS frame (RFC 9113, section 3.4). A server of gRPC
answers it; the system alone, which accepts connections for a process that stands still, does not."""
WATCH_SECONDS = 2.0
LOST_SECONDS = 15.0
"""How long nothing has to answer at the head's address until new requests are refused. After 60 s Ray ends
every process that is connected, without a word to it."""
FINISH_SECONDS = 25.0
"""How long accepted requests may then go on: replicas and their streams do not need the head."""


class Head:
    """Ray's head at ``address`` ("host:port"). ``tls``: how to speak to it; None: without TLS."""

    def __init__(self, address: str, tls: ssl.SSLContext | None = None) -> None:
        self._address = address
        self._tls = tls
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
        host, _, port = self._address.rpartition(":")
        writer: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(WATCH_SECONDS):
                reader, writer = await asyncio.open_connection(host.strip("[]"), int(port), ssl=self._tls)
                writer.write(PREFACE)
                if not await reader.read(1):
                    return False
        except OSError:  # TimeoutError is one
            return False
        finally:
            if writer is not None:
                writer.transport.abort()
        self.failure = None
        return True
