"""Cuts off connections whose clients do not read: closing one would wait for as long as they do not."""

from __future__ import annotations

import asyncio

READ_BYTES = 16 * 1024
"""Bytes that a client has to read in each period, if there are as many for it."""


class ReaderWatch:
    """Watches what a connection's client reads of that which is written for it.

    Args:
        transport: The connection. It is aborted if its client reads less than ``READ_BYTES``, and not all, in
            ``seconds``.
    """

    def __init__(
        self, transport: asyncio.WriteTransport, seconds: float, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._transport = transport
        self._seconds = seconds
        self._loop = loop
        self._written = self._read = 0
        """Bytes that were written; and how many of them were read when the period began."""
        self._timer: asyncio.TimerHandle | None = None

    def wrote(self, size: int) -> None:
        """Note that ``size`` bytes were written."""
        self._written += size
        if self._timer is None:
            self._begin()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _begin(self) -> None:
        if left := self._transport.get_write_buffer_size():
            self._read = self._written - left
            self._timer = self._loop.call_later(self._seconds, self._look)

    def _look(self) -> None:
        self._timer = None
        left = self._transport.get_write_buffer_size()
        if left and self._written - left < self._read + READ_BYTES:
            self._transport.abort()
        else:
            self._begin()
