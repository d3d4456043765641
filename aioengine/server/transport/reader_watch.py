"""Cuts off connections whose clients do not read: closing one would wait for as long as they do not."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import sys
from typing import Any

if sys.platform == "linux":
    import fcntl
    import termios

SEND_TIMEOUT = 60.0
READ_BYTES = 16 * 1024
"""Bytes that a client has to read in each period, if there are as many for it."""
AHEAD_BYTES = 16 * READ_BYTES
"""How much of what a client has read above that counts for the periods that follow. A system says that it has
room again only when that is a good part of its buffer (RFC 9293, section 3.8.6.2.2), so that a client that
reads steadily is seen to read in lumps."""
UNSENT_BYTES = 64 * 1024
"""Bytes that the system takes ahead for a connection, beside those that are under way; it would take
megabytes."""
_ACKED = struct.Struct("=120xQ")  # of tcp_info in linux/tcp.h: tcpi_bytes_acked


class ReaderWatch:
    """Watches what a connection's client reads of that which is written for it. It is aborted if its client
    reads less than ``READ_BYTES``, and not all that there was, in a period; but see ``AHEAD_BYTES``."""

    def __init__(self, transport: asyncio.WriteTransport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._seconds = SEND_TIMEOUT
        self._loop = loop
        self._socket: Any = transport.get_extra_info("socket")
        self._written = self._read = self._due = self._ahead = 0
        """Bytes that were written; that had been read when the period began; that have to be read in it; and
        that were read before it was necessary."""
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False
        transport.set_write_buffer_limits(high=UNSENT_BYTES)  # with TLS it would be 512 KiB
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            with contextlib.suppress(OSError):
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)

    def within(self, seconds: float) -> None:
        """Use the application's length of a period from the next one on."""
        self._seconds = seconds

    def wrote(self, size: int) -> None:
        """Note that ``size`` bytes were written."""
        self._written += size
        if self._timer is None and not self._is_closed:
            self._begin()

    def close(self) -> None:
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()

    def _begin(self) -> None:
        if left := self._left():
            self._read, self._due = self._read_until_now(), min(left, READ_BYTES)
            self._timer = self._loop.call_later(self._seconds, self._look)

    def _look(self) -> None:
        self._timer = None
        ahead = self._ahead + self._read_until_now() - self._read
        self._ahead = min(ahead, AHEAD_BYTES) - self._due
        if self._ahead < 0 and self._left():
            self._transport.abort()
        else:
            self._ahead = max(self._ahead, 0)
            self._begin()

    def _left(self) -> int:
        return self._transport.get_write_buffer_size() + queued_bytes(self._socket)

    def _read_until_now(self) -> int:
        # With TLS there is a buffer between the two that the transport does not tell.
        return acknowledged_bytes(self._socket) or self._written - self._left()


def queued_bytes(connection: Any) -> int:
    """Return how many bytes the system keeps for a client because its system has not acknowledged them; 0
    where it does not tell. ``connection`` is a socket."""
    return _asked(connection, termios.TIOCOUTQ) if sys.platform == "linux" else 0


def unread_bytes(connection: Any) -> int:
    """Return how many bytes have come that this process has not read; 0 where the system does not tell."""
    return _asked(connection, termios.FIONREAD) if sys.platform == "linux" else 0


def _asked(connection: Any, what: int) -> int:
    with contextlib.suppress(OSError, ValueError):
        return int.from_bytes(fcntl.ioctl(connection.fileno(), what, bytes(4)), sys.byteorder)
    return 0


def acknowledged_bytes(connection: Any) -> int:
    """Return how many bytes a client's system has acknowledged; 0 where the system does not tell."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, struct.error):
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _ACKED.size)
            return int(_ACKED.unpack(info)[0])
    return 0
