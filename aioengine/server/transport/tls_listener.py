"""Accepts connections that begin with a TLS handshake.

Event loops have no notion of a connection before its handshake, so it would count in no bound. Here it does:
sockets are accepted and counted first, and the handshake begins once the client's first bytes have come.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable

from aioengine.server.bounds import network_of
from aioengine.server.transport.protocol import BoundedProtocol
from aioengine.server.transport.turns import Start
from aioengine.tasks import end_tasks

REST_SECONDS = 1.0
"""Pause after the system has refused to accept a connection, as it does without free descriptors."""


class TlsListener:
    """A listening socket for TLS, in the form that uvicorn knows servers: it has ``close`` and
    ``wait_closed``.

    Connections are counted by their protocol from the moment at which they are accepted. One that finds no
    room is closed, since it could read an answer only after its handshake. Handshakes take turns with the
    requests of all connections, so that many at once do not hold the loop.

    Args:
        bound: The socket, which listens; it is closed by whoever has bound it.
        context: What connections are secured with.
        make: Makes a connection's protocol.
        timeout: Seconds from a connection's beginning to the end of its handshake, and in which a client has
            to answer when the connection is closed.
        at_once: Connections accepted in one pass of the loop.
    """

    def __init__(
        self,
        bound: socket.socket,
        context: ssl.SSLContext,
        make: Callable[[], BoundedProtocol],
        *,
        timeout: float,
        at_once: int,
    ) -> None:
        self._bound, self._context, self._make = bound, context, make
        self._timeout, self._at_once = timeout, at_once
        self._loop = asyncio.get_running_loop()
        self._open: set[asyncio.Task[None]] = set()
        """Connections before their handshakes and during them."""
        self._rest: asyncio.TimerHandle | None = None
        bound.setblocking(False)
        self._loop.add_reader(bound, self._accept)

    def close(self) -> None:
        """Accept no more, and end the handshakes that are under way."""
        if self._rest is not None:
            self._rest.cancel()
        if self._bound.fileno() >= 0:
            self._loop.remove_reader(self._bound)
        for connection in self._open:
            connection.cancel()

    async def wait_closed(self) -> None:
        """Return once those have ended."""
        await end_tasks(self._open)

    def _accept(self) -> None:
        for _ in range(self._at_once):
            try:
                accepted, address = self._bound.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError:
                self._loop.remove_reader(self._bound)
                bound, accept = self._bound, self._accept
                self._rest = self._loop.call_later(REST_SECONDS, self._loop.add_reader, bound, accept)
                return
            protocol = self._make()
            if protocol.enter(network_of(str(address[0]))):
                accepted.setblocking(False)
                connection = self._loop.create_task(self._begin(accepted, protocol))
                self._open.add(connection)
                connection.add_done_callback(self._open.discard)
            else:
                accepted.close()

    async def _begin(self, accepted: socket.socket, protocol: BoundedProtocol) -> None:
        """Wait for the client's first bytes and for a turn, and do the handshake."""
        is_ours, is_secured = True, False  # until the event loop has it
        came = asyncio.Event()
        try:
            with contextlib.suppress(OSError):  # a failed handshake, and TimeoutError, are such
                async with asyncio.timeout(self._timeout):
                    self._loop.add_reader(accepted, came.set)
                    try:
                        await came.wait()
                    finally:
                        self._loop.remove_reader(accepted)
                    start = Start(protocol.counted_as or "")
                    protocol.turns.ask(start)
                    await start.begun
                    is_ours = False
                    # To its end a client may say nothing, too: by itself a loop would wait for half a minute.
                    await self._loop.connect_accepted_socket(
                        lambda: protocol,
                        accepted,
                        ssl=self._context,
                        ssl_handshake_timeout=self._timeout,
                        ssl_shutdown_timeout=self._timeout,
                    )
                    is_secured = True
        finally:
            if is_ours:
                accepted.close()
            if not is_secured:
                protocol.leave()
