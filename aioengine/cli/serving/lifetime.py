"""Runs a server until its end: signals, systemd, and an engine that dies."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from aioengine.cli.config.reload import Reloader
from aioengine.cli.serving.systemd import Systemd
from aioengine.engine import AsyncEngine
from aioengine.server.app import ServerApp
from aioengine.server.run import Signals, serve_until_told
from aioengine.tasks import end_tasks

if TYPE_CHECKING:
    from aioengine.cli.config.checked import ServerFlags
    from aioengine.fleet.door.client import FleetClient

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
    told = asyncio.ensure_future(_told(systemd, app, signals, flags))
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
        await end_tasks((feeding, told, died, reloading))


async def _told(systemd: Systemd, app: ServerApp, signals: Signals, flags: ServerFlags) -> bool:
    waiting = asyncio.ensure_future(signals.drain.wait())
    waiting.add_done_callback(lambda _: systemd.tell("STOPPING=1", "STATUS=draining"))
    try:
        return await serve_until_told(app, signals, flags.grace_seconds, drain_delay=flags.drain_delay)
    finally:
        waiting.cancel()


async def _reload(
    systemd: Systemd, engine: AsyncEngine | FleetClient, app: ServerApp, signals: Signals, reloader: Reloader
) -> None:
    while True:
        await signals.reload.wait()
        signals.reload.clear()
        systemd.tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            if isinstance(engine, AsyncEngine):
                await reloader.reload(engine, app)
            else:
                await reloader.reload_certificate()
                logger.warning("a fleet's configuration is not read again: restart the server to apply it")
        except Exception:  # otherwise later signals would be ignored, and systemd would wait for READY=1
            logger.exception("the configuration could not be read again")
        systemd.tell("READY=1")
