"""Runs a server until it is told to stop, and stops it without losing accepted requests."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import uvicorn

from aioengine.errors import ConfigError
from aioengine.server.app import Entrance, ServerApp
from aioengine.server.bounds import CONNECTIONS, Shares
from aioengine.server.settings import ListenSettings as ListenSettings
from aioengine.server.transport.protocol import BoundedProtocol, Limits, Turns
from aioengine.server.transport.tls import TlsListener
from aioengine.tasks import end_tasks

logger = logging.getLogger("aioengine.server")

_BACKLOG = 2048
_ACCEPTS = 16
"""Number of connections accepted in one pass of the loop, because uvloop accepts one for each listening
socket. With a single socket, a client waits for seconds while others connect again and again."""
FLUSH_SECONDS = 5


def bind(settings: ListenSettings) -> socket.socket:
    """Listen on the port: connections wait until somebody accepts them. Raises ConfigError."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # Where the protocol is 0, asyncio leaves Nagle's algorithm on, and answers wait for the client's ACK.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((settings.host, settings.port))
        bound.listen(_BACKLOG)  # fails if another process does so, which may have bound the port, too
    except (OSError, OverflowError) as error:
        bound.close()
        place, why = f"{settings.host} port {settings.port}", str(error).rstrip(".")
        raise ConfigError(f"cannot listen on {place}: {why}; choose another host or port") from error
    return bound


@contextlib.asynccontextmanager
async def listening(app: ServerApp | Entrance, settings: ListenSettings) -> AsyncIterator[str]:
    """Serve ``app`` on this loop while the context lasts; yields the URL, without a final slash.

    Leaves signals and logging alone. At the end connections are closed, and open answers are cut off. Raises
    ConfigError if the port is not available.
    """
    config = uvicorn.Config(
        app,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=list(settings.trusted_proxies),
        timeout_keep_alive=settings.keep_alive,  # type: ignore[arg-type] # any number of seconds will do
    )
    config.load()
    server, loop, tls = uvicorn.Server(config), asyncio.get_running_loop(), settings.tls
    server.lifespan, server.servers = config.lifespan_class(config), []
    connections = Shares(CONNECTIONS._replace(most=settings.max_connections))
    turns = Turns(lambda: app.active > 0, loop)
    limits = Limits(connections, turns, settings.header_timeout, settings.send_timeout)

    def protocol() -> BoundedProtocol:
        return BoundedProtocol(limits, config=config, server_state=server.server_state, app_state={})

    with contextlib.ExitStack() as sockets:
        bound = sockets.enter_context(bind(settings))
        listener: Any  # what has ``close`` and ``wait_closed``
        ticking = loop.create_task(server.main_loop(), name="aioengine-http")
        try:
            if tls is not None:
                listener = TlsListener(bound, tls.context, protocol, settings.header_timeout)
                server.servers.append(listener)
            else:
                for _ in range(_ACCEPTS):
                    same = sockets.enter_context(bound.dup())
                    listener = await loop.create_server(protocol, sock=same, backlog=_BACKLOG)
                    server.servers.append(listener)
            name = f"[{settings.host}]" if ":" in settings.host else settings.host
            yield f"{'http' if tls is None else 'https'}://{name}:{bound.getsockname()[1]}"
        finally:
            app.close()
            # Answers that are complete may still be on their way to clients that read slowly.
            config.timeout_graceful_shutdown = 1 if app.active else FLUSH_SECONDS
            server.should_exit = True
            await ticking
            await server.shutdown([bound])


class Signals:
    """SIGTERM and SIGINT as events: the first asks to drain, the second to give up. SIGHUP sets ``reload``;
    its handler clears it."""

    def __init__(self) -> None:
        self.reload = asyncio.Event()
        self.drain = asyncio.Event()
        self.abort = asyncio.Event()

    @contextlib.contextmanager
    def handled(self, *numbers: signal.Signals) -> Iterator[None]:
        """Handle these, which otherwise end the process. While a server starts nothing is to be drained, and
        SIGTERM and SIGINT may do so."""
        loop = asyncio.get_running_loop()
        for number in numbers:
            loop.add_signal_handler(number, self._received, number)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def _received(self, number: signal.Signals) -> None:
        if number == signal.SIGHUP:
            self.reload.set()
            return
        first = not self.drain.is_set()
        logger.info("%s: %s", number.name, "draining" if first else "giving up")
        (self.drain if first else self.abort).set()


async def serve_until_told(
    app: ServerApp, signals: Signals, grace_seconds: float, *, drain_delay: float = 0.0
) -> bool:
    """Wait for a signal, then drain. Returns False if accepted requests were still open when the grace period
    ended or a second signal came.

    For ``drain_delay`` seconds after the signal ``/ready`` answers 503 while requests are still accepted, so
    that load balancers can move their traffic before requests are refused.
    """
    await signals.drain.wait()
    aborted = asyncio.ensure_future(signals.abort.wait())
    tasks: list[asyncio.Future[Any]] = [aborted]
    try:
        if drain_delay:
            app.leave()
            logger.info("not ready from now on; requests are accepted for another %g s", drain_delay)
            await asyncio.wait({aborted}, timeout=drain_delay)
        draining = asyncio.ensure_future(app.drain())
        tasks.append(draining)
        if app.active:
            logger.info("draining: %d requests are left; they have %g s to end", app.active, grace_seconds)
        await asyncio.wait(tasks, timeout=grace_seconds, return_when=asyncio.FIRST_COMPLETED)
        if not draining.done():
            logger.warning("%d requests are cut off", app.active)
        return draining.done()
    finally:
        await end_tasks(tasks)
