"""Handles what hangs: Ray's head is noticed before Ray ends this process because of it, and hanging replicas
are killed once Serve has given them up, too."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Set
from contextlib import suppress

from aioengine.errors import EngineDead
from aioengine.executors.ray.address import refusal
from aioengine.fleet.wire import Hello

logger = logging.getLogger("aioengine.fleet")

_SILENCE = ("UNAVAILABLE", "DEADLINE_EXCEEDED")
"""gRPC's words where nothing answers. A head that refuses, such as a token that was changed, lives."""
WATCH_SECONDS = 2.0
LOST_SECONDS = 15.0
"""How long nothing has to answer at the head's address until new requests are refused. After 60 s Ray ends
every process that is connected, without a word to it."""
FINISH_SECONDS = 25.0
"""How long accepted requests may then go on: replicas and their streams do not need the head."""


class Head:
    """Ray's head at ``address`` ("host:port")."""

    def __init__(self, address: str) -> None:
        self._address = address
        self.failure: EngineDead | None = None
        """Set while it does not answer."""

    async def until_lost(self) -> EngineDead:
        """Watch it until nothing has answered at its address for ``LOST_SECONDS``; then :attr:`failure` is
        set, and returned."""
        loop = asyncio.get_running_loop()
        heard = loop.time()
        while loop.time() - heard < LOST_SECONDS:
            await asyncio.sleep(WATCH_SECONDS)
            if await self.answers():
                heard = loop.time()
        self.failure = EngineDead(
            f"Ray's head at {self._address} does not answer, and without it Ray ends this server; start Ray "
            "and the server again"
        )
        return self.failure

    async def is_back(self, while_needed: Callable[[], bool]) -> bool:
        """Wait until it answers again, or ``while_needed()`` is false, at most ``FINISH_SECONDS``. Returns
        whether it answers."""
        loop = asyncio.get_running_loop()
        end = loop.time() + FINISH_SECONDS
        while while_needed() and loop.time() < end:
            if await self.answers():
                return True
            await asyncio.sleep(WATCH_SECONDS)
        return await self.answers()

    async def answers(self) -> bool:
        """Return whether a server answers at its address; then there is no :attr:`failure` any more."""
        why = await asyncio.to_thread(refusal, self._address, WATCH_SECONDS)
        if why is not None and why.startswith(_SILENCE):
            return False
        self.failure = None
        return True


class HungReplicas:
    """The replicas that this gateway has lost because they hang.

    A process that hangs does not end when Serve asks it to, and keeps its CPUs while Serve waits for that
    (``graceful_shutdown_timeout_s``), so there is no room for another one in its place. This gateway does not
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
            hello = self._lost.pop(replica, None)
            if hello is None:  # meanwhile it has come back, or another call kills it
                continue
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
            with suppress(ValueError):  # another gateway may have done this already
                # Ray's own daemon on that node sends SIGKILL after some seconds, if the process does not end.
                ray.kill(ray.get_actor(**found))
