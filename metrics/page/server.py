"""uvicorn inside an application: on its event loop, without touching signals or logging."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

try:
    import uvicorn
except ImportError as error:
    raise ImportError("serving the page needs uvicorn: pip install 'aioengine[server]'") from error


class EmbeddedServer(uvicorn.Server):
    """A server that leaves signals to the application around it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def serve(app: Any, host: str, port: int, *, before_shutdown: Callable[[], None]) -> AsyncIterator[str]:
    """Serve an ASGI application while the context lasts; yields its URL."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listening:
        # Connections inherit it; asyncio sets it only for sockets that name their protocol.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        config = uvicorn.Config(app, lifespan="off", log_config=None, access_log=False)
        server = EmbeddedServer(config)
        task = asyncio.get_running_loop().create_task(
            server.serve(sockets=[listening]), name="aioengine-page-server"
        )
        name = f"[{host}]" if family == socket.AF_INET6 else host
        try:
            yield f"http://{name}:{listening.getsockname()[1]}/"
        finally:
            before_shutdown()
            server.should_exit = True
            await task
