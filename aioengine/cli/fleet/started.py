"""Starts a fleet for a server, and ends it without leaving a process behind."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, TypeVar

from aioengine.errors import ConfigError
from aioengine.fleet import cluster
from aioengine.fleet.config import FleetConfig
from aioengine.fleet.gateway.client import FleetClient
from aioengine.info import LoadProgress
from aioengine.tasks import end_tasks, run_to_completion

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

T = TypeVar("T")

logger = logging.getLogger("aioengine.fleet")

STATUS_SECONDS = 1.0
"""How often Serve is asked whether it has given up. Each time costs its controller 15 ms, beside replicas
that start."""


@asynccontextmanager
async def started_fleet(
    config: FleetConfig, progress: LoadProgress, tracer_provider: TracerProvider | None = None
) -> AsyncIterator[FleetClient]:
    """Context with a running fleet behind a client. At its end, or after a failure, it ends Ray, if Ray was
    started here, and the replicas, if this was their last gateway.

    Raises ConfigError, if possible before anything is started.
    """
    from aioengine.fleet.deployment import plan_replica, read_model, replica_application

    cluster.require_ray()
    where = cluster.address()
    most = config.bounds[1]
    if where is None:
        cluster.check_resources(config)
    else:
        cluster.check_address(where)
    planned, plan = await asyncio.to_thread(plan_replica, config, share=most if where is None else None)
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    ended = False

    def end_by_sigterm() -> None:
        nonlocal ended
        ended = True
        if task is not None:
            task.cancel()  # so that it can clean up; the server handles the signal itself from its start on

    def listen() -> None:
        loop.remove_signal_handler(signal.SIGTERM)
        loop.add_signal_handler(signal.SIGTERM, end_by_sigterm)

    listen()
    ending = AsyncExitStack()
    try:
        progress("starting Ray", 0, 1)
        reading = asyncio.ensure_future(asyncio.to_thread(read_model, config, plan))  # while Ray starts
        each = config.cpus_per_replica
        ray = await _to_its_end(lambda: cluster.connect(most * each, each))
        ending.push_async_callback(asyncio.to_thread, ray.close)
        listen()  # again, because Ray installs its own handler
        own = ray.own
        progress("starting replicas", 0, config.replicas)
        joined = await _to_its_end(
            lambda: cluster.open_gateway(config, lambda: replica_application(planned, inherit=own))
        )
        if not own:
            ending.push_async_callback(asyncio.to_thread, joined.close)
        client = FleetClient(config, joined.handle, *await reading, tracer_provider, gateway=joined.name)
        ending.push_async_callback(client.stop)
        await _all_there(client, config.name)
        logger.info("fleet %s runs on Ray at %s", config.name, cluster.current_address())
        client.watch_head(cluster.current_address())
        yield client
    except asyncio.CancelledError as error:
        if ended:
            raise ConfigError("stopped by SIGTERM") from error
        raise
    finally:
        loop.add_signal_handler(signal.SIGTERM, lambda: None)  # nothing interrupts the end: some seconds
        await run_to_completion(ending.aclose())
        loop.remove_signal_handler(signal.SIGTERM)


async def _all_there(client: FleetClient, name: str) -> None:
    """Start the client, which waits for the replicas for as long as Serve tries to start them. Raises
    ConfigError, with the reason, when Serve has given up."""
    starting = asyncio.ensure_future(client.start(within=None))
    try:
        while not starting.done():
            await asyncio.wait([starting], timeout=STATUS_SECONDS)
            if starting.done() and starting.exception() is None:
                break
            if (why := await asyncio.to_thread(cluster.why_it_failed, name)) is not None:
                raise ConfigError(f"the fleet did not start: {why}")
        starting.result()
    finally:
        await end_tasks([starting])


async def _to_its_end(work: Callable[[], T]) -> T:
    """Run ``work()`` in a thread. If the call is cancelled, ``work`` still runs to its end, and its result is
    closed."""
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await run_to_completion(task)
    except asyncio.CancelledError:
        close = getattr(None if task.exception() else task.result(), "close", None)
        if close is not None:
            await asyncio.to_thread(close)
        raise
