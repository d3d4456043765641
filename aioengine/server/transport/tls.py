"""TLS: a certificate that can be renewed while connections are open, and bounds on handshakes."""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import socket
import ssl
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from aioengine.errors import ConfigError
from aioengine.server.bounds import network_of
from aioengine.server.transport.protocol import BoundedProtocol
from aioengine.tasks import end_tasks

REST_SECONDS = 1.0
"""Pause after the system has refused to accept a connection, as it does without free descriptors."""
_VALIDITY = re.compile(rb"\x30.[\x17\x18].\d+Z(?:\x17\x0d(\d{12}Z)|\x18\x0f(\d{14}Z))", re.DOTALL)
"""Of an X.509 certificate in DER: the two times of its validity (RFC 5280, section 4.1.2.5)."""


class Certificate:
    """A certificate with its key, from two PEM files. ``context`` is what a server listens with.

    Raises ConfigError on construction if the files cannot be used.
    """

    def __init__(self, cert: str, key: str) -> None:
        self._cert, self._key = cert, key
        self.context, self._content, self.expires = self._read()
        self._current = self.context
        # Asked at each handshake, also of clients that name no server.
        self.context.sni_callback = self._hand_over

    def renew(self) -> bool:
        """Use what the files hold now for connections from now on; open ones keep what they have. Returns
        whether it is another certificate. Blocks. Raises ConfigError if they cannot be used, or hold a
        certificate that has expired."""
        context, content, expires = self._read()
        if expires < time.time():
            raise ConfigError(f"tls_cert={self._cert!r}: {expiry(expires)}")
        is_other = content != self._content
        self._current, self._content, self.expires = context, content, expires
        return is_other

    def _read(self) -> tuple[ssl.SSLContext, bytes, float]:
        """Return a context, the certificate's file, and the Unix time at which it expires."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION  # each costs the server as much as a handshake
        context.set_alpn_protocols(["http/1.1"])
        try:
            context.load_cert_chain(self._cert, self._key, password=_refuse_password)
            content = Path(self._cert).read_bytes()
            return context, content, _expires(content.decode("ascii", "replace"))
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            why = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
            raise ConfigError(
                f"tls_cert={self._cert!r}, tls_key={self._key!r}: {why}; both must be PEM files: the "
                "certificate with its chain, and the key that belongs to it, without a password"
            ) from error

    def _hand_over(self, connection: ssl.SSLObject, name: str | None, listening: ssl.SSLContext) -> None:
        connection.context = self._current


def expiry(expires: float) -> str:
    """Say when a certificate expires, or that it has."""
    how = "has expired" if expires < time.time() else "expires"
    return f"the TLS certificate {how} at {datetime.fromtimestamp(expires, UTC):%Y-%m-%d %H:%M} UTC"


def _expires(pem: str) -> float:
    """Return when the first certificate of a PEM file expires; infinity if that cannot be read."""
    first = re.search(f"{ssl.PEM_HEADER}.*?{ssl.PEM_FOOTER}", pem, re.DOTALL)
    if first is None:  # one of the other headers that OpenSSL knows
        return math.inf
    found = _VALIDITY.search(ssl.PEM_cert_to_DER_cert(first[0]))
    if found is None:
        return math.inf
    text = (found[1] or found[2]).decode()
    form = "%y%m%d%H%M%SZ" if found[1] else "%Y%m%d%H%M%SZ"
    return datetime.strptime(text, form).replace(tzinfo=UTC).timestamp()


def _refuse_password() -> str:
    """Keep OpenSSL from asking for one on the terminal."""
    raise ValueError("the key is encrypted")


class TlsListener:
    """A listening socket for TLS, in the form that uvicorn knows servers: it has ``close`` and
    ``wait_closed``.

    Event loops have no notion of a connection before its handshake, so it would count in no bound. Here
    sockets are accepted and counted first, and the handshake begins once the client's first bytes have come,
    and in turn with the requests of all connections. One that finds no room is closed, since it could read an
    answer only after its handshake.

    Args:
        bound: The socket, which listens; it is closed by whoever has bound it.
        timeout: Seconds from a connection's beginning to the end of its handshake, and in which a client has
            to answer when the connection is closed.
    """

    def __init__(
        self,
        bound: socket.socket,
        context: ssl.SSLContext,
        make: Callable[[], BoundedProtocol],
        timeout: float,
    ) -> None:
        bound.setblocking(False)
        self._bound, self._context, self._make, self._timeout = bound, context, make, timeout
        self._loop = asyncio.get_running_loop()
        self._open = {self._loop.create_task(self._accept())}
        """The task that accepts connections, and those of connections whose handshake is not complete."""

    def close(self) -> None:
        """Accept no more, and end the handshakes that are under way."""
        for task in self._open:
            task.cancel()

    async def wait_closed(self) -> None:
        """Return once those have ended."""
        await end_tasks(self._open)

    async def _accept(self) -> None:
        while True:
            await asyncio.sleep(0)  # between two connections that have come already, too
            try:
                accepted, address = await self._loop.sock_accept(self._bound)
            except ConnectionAbortedError:  # by its client, who could hold up all others
                continue
            except OSError:
                await asyncio.sleep(REST_SECONDS)
                continue
            protocol = self._make()
            if protocol.enter(network_of(str(address[0]))):
                connection = self._loop.create_task(self._begin(accepted, protocol))
                self._open.add(connection)
                connection.add_done_callback(self._open.discard)
            else:
                accepted.close()

    async def _begin(self, accepted: socket.socket, protocol: BoundedProtocol) -> None:
        """Wait for the client's first bytes and for a turn, and do the handshake."""
        is_ours, is_secured = True, False  # until the event loop has it
        turn = asyncio.Event()

        def ask() -> None:
            self._loop.remove_reader(accepted)
            protocol.turns.ask(protocol.counted_as or "", turn.set)

        try:
            with contextlib.suppress(OSError):  # a failed handshake, and TimeoutError, are such
                async with asyncio.timeout(self._timeout):
                    self._loop.add_reader(accepted, ask)
                    await turn.wait()
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
                self._loop.remove_reader(accepted)
                accepted.close()
            if not is_secured:
                protocol.leave()
