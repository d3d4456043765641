"""Runs a server until its end: signals, systemd, and an engine that dies."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from aioengine.cli.config.reload import Reloader
from aioengine.engine import AsyncEngine
from aioengine.server.app import ServerApp
from aioengine.server.run import Signals, serve_until_told
from aioengine.tasks import end_tasks

if TYPE_CHECKING:
    from aioengine.cli.config.checked import ServerFlags
    from aioengine.fleet.gateway.client import FleetClient

logger = logging.getLogger("aioengine.server")

LINGER_SECONDS = 2.0
"""How long a server with a dead engine stays, so that clients get their errors, and probes see it."""


async def serve_to_the_end(
    engine: AsyncEngine | FleetClient,
    app: ServerApp,
    signals: Signals,
    flags: ServerFlags,
    reloader: Reloader,
) -> bool:
    """Serve until a signal asks to end and accepted requests are answered, or until the engine is dead.

    Returns False if requests were cut off. Reports to systemd, if systemd has started this process.
    """
    systemd = Systemd()
    systemd.tell("READY=1", "STATUS=serving")
    feeding = asyncio.ensure_future(systemd.feed(lambda: engine.state != "dead" and not app.context.stuck))
    draining = asyncio.ensure_future(signals.drain.wait())
    draining.add_done_callback(lambda _: systemd.tell("STOPPING=1", "STATUS=draining"))
    told = asyncio.ensure_future(
        serve_until_told(app, signals, flags.grace_seconds, drain_delay=flags.drain_delay)
    )
    died = asyncio.ensure_future(engine.until_dead())
    reloading = asyncio.ensure_future(_reload(systemd, engine, app, signals, reloader))
    try:
        await asyncio.wait({told, died}, return_when=asyncio.FIRST_COMPLETED)
        if not told.done():
            logger.error("the engine is dead: %s", died.result())
            systemd.tell(f"STATUS=the engine is dead: {died.result()}"[:500].replace("\n", " "))
            await asyncio.wait({told}, timeout=None if flags.keep_dead else LINGER_SECONDS)
        if not told.done():
            logger.error("ending, because the engine is dead (--keep-dead would stay)")
        return told.done() and told.result()
    finally:
        systemd.tell("STOPPING=1")
        await end_tasks((feeding, draining, told, died, reloading))


async def _reload(
    systemd: Systemd, engine: AsyncEngine | FleetClient, app: ServerApp, signals: Signals, reloader: Reloader
) -> None:
    while True:
        await signals.reload.wait()
        signals.reload.clear()
        systemd.tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            await reloader.reload(engine if isinstance(engine, AsyncEngine) else None, app)
        except Exception:  # otherwise later signals would be ignored, and systemd would wait for READY=1
            logger.exception("the configuration could not be read again")
        systemd.tell("READY=1")


class Systemd:
    """Reports to systemd, for ``Type=notify`` of a unit, with ``WatchdogSec=`` or without: sd_notify(3).
    Without the variable ``NOTIFY_SOCKET`` nothing is sent."""

    def __init__(self) -> None:
        self._address = os.environ.get("NOTIFY_SOCKET", "")
        if self._address.startswith("@"):  # in the abstract namespace
            self._address = f"\0{self._address[1:]}"
        own = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        timeout = os.environ.get("WATCHDOG_USEC", "") if own else ""
        self.watchdog_seconds = int(timeout) / 1e6 if timeout.isdigit() and int(timeout) else None
        """Seconds after which systemd kills a process that does not report; None: there is no watchdog."""

    def tell(self, *lines: str) -> None:
        """Send assignments such as ``READY=1``. Those that cannot be sent are dropped: systemd has its own
        timeouts."""
        if not self._address:
            return
        kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK
        with suppress(OSError), socket.socket(socket.AF_UNIX, kind) as sender:
            sender.sendto("\n".join(lines).encode(), self._address)

    async def feed(self, goes_on: Callable[[], bool]) -> None:
        """Feed the watchdog at intervals while ``goes_on()`` is true, until cancelled.

        This runs on the event loop, so a blocked loop does not feed it either.
        """
        while self.watchdog_seconds is not None:
            if goes_on():
                self.tell("WATCHDOG=1")
            await asyncio.sleep(self.watchdog_seconds / 3)
