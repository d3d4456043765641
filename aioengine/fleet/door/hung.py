"""Kills hanging replicas, once Serve has given them up, too."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Set
from contextlib import suppress

from aioengine.fleet.wire import Hello

logger = logging.getLogger("aioengine.fleet")


class Hung:
    """The replicas that this door has lost because they hang.

    A process that hangs does not end when Serve asks it to, and keeps its CPUs while Serve waits for that
    (``graceful_shutdown_timeout_s``), so there is no room for another one in its place. This door does not
    kill it on its own judgement, because the network between the two might be broken. Serve checks each
    replica's health, too, and removes those that do not answer.
    """

    def __init__(self) -> None:
        self._lost: dict[str, Hello] = {}

    def add(self, replica: str, hello: Hello) -> None:
        self._lost[replica] = hello

    def back(self, replica: str) -> None:
        """Note that the replica reports again."""
        self._lost.pop(replica, None)

    async def end_all_but(self, kept: Set[str]) -> None:
        """Kill the hanging replicas that Serve does not list any more."""
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
            except (
                Exception
            ) as error:  # for example, Ray's head is gone; Serve tries, too, half a minute later
                logger.warning("replica %s cannot be killed: %s", replica, error)


def _kill(hello: Hello) -> None:
    import ray

    for found in ray.util.list_named_actors(all_namespaces=True):
        if found["name"] == hello.actor:
            with suppress(ValueError):  # another door may have done this already
                # Ray's own daemon on that node sends SIGKILL after some seconds, if the process does not end.
                ray.kill(ray.get_actor(**found))
