"""The transport that uvicorn writes answers to."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from aioengine.server.transport.reader_watch import ReaderWatch


class Connection(Protocol):
    """The protocol that a transport belongs to."""

    cycle: Any
    loop: asyncio.AbstractEventLoop
    reader: ReaderWatch

    @property
    def is_closing(self) -> bool: ...
    def close(self) -> None: ...
    def hold(self, is_full: bool) -> None: ...


class AnswerTransport:
    """The transport as uvicorn sees it; the protocol decides when it closes and pauses."""

    def __init__(self, transport: asyncio.Transport, protocol: Connection) -> None:
        self._protocol = protocol
        self._real = transport
        self.get_extra_info = transport.get_extra_info
        self._head = b""
        self._head_of: object = None
        """The cycle whose answer has begun."""

    def write(self, data: bytes) -> None:
        """Write it; the headers of an answer together with what follows in the same pass of the loop."""
        protocol, cycle = self._protocol, self._protocol.cycle
        if protocol.is_closing:
            return
        if cycle is not self._head_of and cycle is not None and cycle.response_started:
            self._head_of, self._head = cycle, data
            protocol.loop.call_soon(self.flush)
        elif self._head:
            self._head, data = b"", self._head + data
            self._write(data)
        else:
            self._write(data)

    def flush(self) -> None:
        """Write headers that nothing has followed."""
        if self._head and not self._protocol.is_closing:
            self._write(self._head)
        self._head = b""

    def _write(self, data: bytes) -> None:
        self._real.write(data)
        self._protocol.reader.wrote(len(data))

    def is_closing(self) -> bool:
        return self._protocol.is_closing

    def close(self) -> None:
        self.flush()
        self._protocol.close()

    def pause_reading(self) -> None:
        self._protocol.hold(True)

    def resume_reading(self) -> None:
        self._protocol.hold(False)
