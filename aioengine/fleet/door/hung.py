"""Replicas that hang: ended for good once Serve, too, has given them up."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Set
from contextlib import suppress

from aioengine.fleet.wire import Hello

logger = logging.getLogger("aioengine.fleet")


class Hung:
    """The replicas that this door has lost because they stood still.

    A process that stands still does not end when Serve asks it to, and keeps its CPUs while Serve waits for
    that (``graceful_shutdown_timeout_s``), so there is no room for another one in its place. This door's word
    alone does not have it killed: the network between the two might be what is broken. Serve checks each
    replica's health by itself, and takes out those that do not answer.
    """

    def __init__(self) -> None:
        self._lost: dict[str, Hello] = {}

    def add(self, replica: str, hello: Hello) -> None:
        self._lost[replica] = hello

    def back(self, replica: str) -> None:
        """Note that the replica is heard of again."""
        self._lost.pop(replica, None)

    async def end_all_but(self, kept: Set[str]) -> None:
        """Kill those that are not among Serve's replicas any more."""
        for replica in self._lost.keys() - kept:
            hello = self._lost.pop(replica)
            logger.warning(
                "replica %s hangs, and Serve has given it up: process %d on %s is killed",
                replica,
                hello.pid,
                hello.node,
            )
            try:
                await asyncio.to_thread(_kill, hello)
            except Exception as error:  # Ray's head is gone, for one; Serve tries too, half a minute later
                logger.warning("replica %s cannot be killed: %s", replica, error)


def _kill(hello: Hello) -> None:
    import ray

    for found in ray.util.list_named_actors(all_namespaces=True):
        if found["name"] == hello.actor:
            with suppress(ValueError):  # it has gone meanwhile: several doors may do this
                # Ray's own daemon on that node sends SIGKILL after some seconds, if the process does not end.
                ray.kill(ray.get_actor(**found))
