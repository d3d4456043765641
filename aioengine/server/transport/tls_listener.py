"""Accepts connections that begin with a TLS handshake.

Event loops have no notion of a connection before its handshake, so it would count in no bound. Here it does:
sockets are accepted and counted first, and the handshake begins once the client's first bytes have come.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from typing import Any

from aioengine.server.bounds import network_of
from aioengine.server.transport.protocol import BoundedProtocol

REST_SECONDS = 1.0
"""Pause after the system has refused to accept a connection, as it does without free descriptors."""


class TlsListener:
    """A listening socket for TLS, in the form that uvicorn knows servers: it has ``close`` and
    ``wait_closed``.

    Connections count in the protocol's ``crowd`` from the moment at which they are accepted. One that finds
    no room is closed, since it could read an answer only after its handshake. Handshakes take turns with the
    requests of all connections, so that many at once do not hold the loop.

    Args:
        bound: The socket; it is closed by whoever has bound it.
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
        self._bound = bound
        self._context = context
        self._make = make
        self._timeout = timeout
        self._at_once = at_once
        self._loop = asyncio.get_running_loop()
        self._open: set[_Newcomer] = set()
        self._rest: asyncio.TimerHandle | None = None

    def listen(self, backlog: int) -> None:
        """Begin to accept connections. Raises OSError if another socket listens on the port."""
        self._bound.listen(backlog)
        self._bound.setblocking(False)
        self._loop.add_reader(self._bound, self._accept)

    def close(self) -> None:
        """Accept no more, and end the handshakes that are under way."""
        if self._rest is not None:
            self._rest.cancel()
        if self._bound.fileno() >= 0:
            self._loop.remove_reader(self._bound)
        for newcomer in list(self._open):
            newcomer.close()

    async def wait_closed(self) -> None:
        """Return once those have ended."""
        tasks = [newcomer.task for newcomer in self._open if newcomer.task is not None]
        await asyncio.gather(*tasks, return_exceptions=True)

    def _accept(self) -> None:
        for _ in range(self._at_once):
            try:
                accepted, address = self._bound.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError:
                self._loop.remove_reader(self._bound)
                self._rest = self._loop.call_later(
                    REST_SECONDS, self._loop.add_reader, self._bound, self._accept
                )
                return
            protocol = self._make()
            if protocol.enter(network_of(str(address[0]))):
                accepted.setblocking(False)
                _Newcomer(accepted, protocol, self._secured, self._open).wait(self._timeout)
            else:
                accepted.close()

    async def _secured(self, accepted: socket.socket, protocol: BoundedProtocol) -> None:
        # To its end a client may say nothing, too: by itself a loop would wait for that for half a minute.
        await self._loop.connect_accepted_socket(
            lambda: protocol,
            accepted,
            ssl=self._context,
            ssl_handshake_timeout=self._timeout,
            ssl_shutdown_timeout=self._timeout,
        )


class _Newcomer:
    """A connection before its handshake and during it; one of ``waiting`` meanwhile."""

    def __init__(
        self,
        accepted: socket.socket,
        protocol: BoundedProtocol,
        secure: Callable[[socket.socket, BoundedProtocol], Any],
        waiting: set[_Newcomer],
    ) -> None:
        self._socket: socket.socket | None = accepted
        """None once the event loop has it."""
        self._protocol = protocol
        self._secure = secure
        self._waiting = waiting
        self._timer: asyncio.TimerHandle | None = None
        self.loop = asyncio.get_running_loop()
        self.task: asyncio.Task[None] | None = None
        """The handshake."""
        self.has_asked = False
        self.owner = protocol.counted_as or ""

    @property
    def is_closing(self) -> bool:
        return self not in self._waiting

    def wait(self, seconds: float) -> None:
        """Wait for the client's first bytes; the handshake has to be done within ``seconds``."""
        assert self._socket is not None
        self._waiting.add(self)
        self.loop.add_reader(self._socket, self._greeted)
        self._timer = self.loop.call_later(seconds, self.close)

    def close(self) -> None:
        if self._socket is not None:
            self.loop.remove_reader(self._socket)
            self._socket.close()
            self._socket = None
            self._end(has_failed=True)
        elif self.task is not None:
            self.task.cancel()

    def take_turn(self) -> None:
        """Begin the handshake."""
        if self._socket is not None:
            accepted, self._socket = self._socket, None
            self.task = self.loop.create_task(self._secure(accepted, self._protocol))
            self.task.add_done_callback(self._ended)

    def _greeted(self) -> None:
        assert self._socket is not None
        self.loop.remove_reader(self._socket)
        self._protocol.turns.ask(self)

    def _ended(self, task: asyncio.Task[None]) -> None:
        failed = task.cancelled() or task.exception() is not None
        self._end(has_failed=failed)

    def _end(self, *, has_failed: bool) -> None:
        """Note that there is a connection now, or that there will be none."""
        self._waiting.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        if has_failed:
            self._protocol.leave()
