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
from aioengine.server.settings import ListenSettings as ListenSettings
from aioengine.server.transport.protocol import BoundedProtocol, Limits
from aioengine.server.transport.tls import TlsListener
from aioengine.tasks import end_tasks

logger = logging.getLogger("aioengine.server")

_BACKLOG = 2048
_ACCEPTS = 16
"""Number of connections accepted in one pass of the loop, because uvloop accepts one for each listening
socket. With a single socket, a client waits for seconds while others connect again and again."""
FLUSH_SECONDS = 5


class _Server(uvicorn.Server):
    """uvicorn with connections that are bounded, and with TLS. Signals are the application's around it."""

    def __init__(self, config: uvicorn.Config, settings: ListenSettings, limits: Limits) -> None:
        super().__init__(config)
        self._settings, self._limits = settings, limits
        self.listens = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup([])
        tls, loop = self._settings.tls, asyncio.get_running_loop()
        for bound in sockets or []:
            if tls is None:
                server: Any = await loop.create_server(self._protocol, sock=bound, backlog=_BACKLOG)
                self.servers.append(server)
            elif not self.servers:
                bound.listen(_BACKLOG)
                server = TlsListener(bound, tls.context, self._protocol, self._settings.header_timeout)
                self.servers.append(server)
        self.listens.set()

    def _protocol(self) -> BoundedProtocol:
        state = self.lifespan.state
        return BoundedProtocol(
            self._limits, config=self.config, server_state=self.server_state, app_state=state
        )


def bind(settings: ListenSettings) -> socket.socket:
    """Bind the port; connections are refused until something listens on it. Raises ConfigError."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # Where the protocol is 0, asyncio leaves Nagle's algorithm on, and answers wait for the client's ACK.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((settings.host, settings.port))
    except (OSError, OverflowError) as error:
        bound.close()
        raise _cannot_listen(settings, error) from error
    return bound


def _cannot_listen(settings: ListenSettings, error: BaseException) -> ConfigError:
    why = str(error).rstrip(".")
    return ConfigError(
        f"cannot listen on {settings.host} port {settings.port}: {why}; choose another host or port"
    )


@contextlib.asynccontextmanager
async def listening(
    app: ServerApp | Entrance, settings: ListenSettings, bound: socket.socket | None = None
) -> AsyncIterator[str]:
    """Serve ``app`` on this loop while the context lasts; yields the URL, without a final slash.

    Leaves signals and logging alone. At the end connections are closed, and open answers are cut off.
    ``bound`` is a socket of :func:`bind`; it is closed at the end. Raises ConfigError if the port is not
    available.
    """
    with contextlib.ExitStack() as sockets:
        bound = sockets.enter_context(bind(settings) if bound is None else bound)
        same = [sockets.enter_context(bound.dup()) for _ in range(_ACCEPTS - 1)]
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
        timeouts = settings.header_timeout, settings.send_timeout
        limits = Limits(settings.max_connections, *timeouts, is_busy=lambda: app.active > 0)
        server = _Server(config, settings, limits)
        task = asyncio.get_running_loop().create_task(
            server.serve(sockets=[bound, *same]), name="aioengine-http"
        )
        port = bound.getsockname()[1]
        listens = asyncio.ensure_future(server.listens.wait())
        try:
            await asyncio.wait({task, listens}, return_when=asyncio.FIRST_COMPLETED)
            error = task.exception() if task.done() else None
            if error is not None:  # another process listened first, after both had bound the port
                raise _cannot_listen(settings, error) from error
            yield f"{settings.url}:{port}"
        finally:
            listens.cancel()
            app.close()
            # Answers that are complete may still be on their way to clients that read slowly.
            config.timeout_graceful_shutdown = 1 if app.active else FLUSH_SECONDS
            server.should_exit = True
            with contextlib.suppress(OSError):
                await task


class Signals:
    """SIGTERM and SIGINT as events: the first asks to drain, the second to give up. SIGHUP sets ``reload``;
    its handler clears it."""

    def __init__(self) -> None:
        self.reload = asyncio.Event()
        self.drain = asyncio.Event()
        self.abort = asyncio.Event()

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Handle SIGTERM and SIGINT. While a server starts nothing is to be drained, and they end it."""
        loop, numbers = asyncio.get_running_loop(), (signal.SIGTERM, signal.SIGINT)
        for number in numbers:
            loop.add_signal_handler(number, self._received, number)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    @contextlib.contextmanager
    def reload_handled(self) -> Iterator[None]:
        """Handle SIGHUP, which otherwise ends the process."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, self.reload.set)
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGHUP)

    def _received(self, number: signal.Signals) -> None:
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
