"""Ports for servers that must be told which one to take."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator


@contextlib.contextmanager
def held_port() -> Iterator[int]:
    """A free port of this machine, which nobody else is given while the context lasts: it is bound. A server
    can listen on it all the same, since servers set SO_REUSEADDR, as this does, and this does not listen."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]
