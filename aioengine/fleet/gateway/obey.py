"""A Serve request router that sends each call to the replica that its caller names, because the gateway does
the routing."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ray.serve.request_router import RequestRouter

from aioengine.fleet.gateway.discovery import replicas_changed

ROUTER_PATH = f"{__name__}:ObeyingRouter"
ASK_SECONDS = 1.0
"""Seconds between two questions to Ray's head for a replica's actor, if it does not answer."""
THREADS = 4
"""Number of replicas that it is asked for at once."""


class ObeyingRouter(RequestRouter):  # type: ignore[misc] # Ray has no types for it
    """Chooses the replica that the keyword ``to`` names, or any replica without it.

    Serve's router asks Ray's head for the actor of each new replica, and waits for the answer: for a minute
    if the head hangs. All streams of the gateway would stand still, because this router runs on its event
    loop. So threads ask first, and what is known already, or gone, does not wait for them.

    Ray sends this class by value, with copies of the module's variables, so state must be elsewhere.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        super().initialize_state(**kwargs)
        self._wanted: Sequence[Any] = ()
        """The replicas that there are, as Serve's controller has last said."""
        self._asking: dict[Any, asyncio.Task[None]] = {}
        """Questions to the head, by id of a new replica."""
        self._found: dict[Any, Any] = {}
        """New replicas that the head was asked for, by id; None: it does not know them any more."""
        self._threads = ThreadPoolExecutor(THREADS, "aioengine-replicas")

    def _update_running_replicas(self, running_replicas: Sequence[Any]) -> None:
        if os.environ.get("RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP") != "0":
            super()._update_running_replicas(running_replicas)  # nobody minds that this loop waits
            return
        self._wanted = running_replicas
        for replica in running_replicas:
            if replica.replica_id not in self._replicas and replica.replica_id not in self._asking:
                asking = asyncio.get_running_loop().create_task(self._ask(replica))
                self._asking[replica.replica_id] = asking
        self._take()

    def _take(self) -> None:
        """Have those of the wanted replicas that are known, and no others."""
        known = self._replicas.keys() | self._found.keys()
        super()._update_running_replicas([each for each in self._wanted if each.replica_id in known])
        self._found.clear()

    async def _ask(self, replica: Any) -> None:
        """Ask for one new replica. Others do not wait for its answer."""
        loop, key = asyncio.get_running_loop(), replica.replica_id
        while any(each.replica_id == key for each in self._wanted):
            try:
                self._found[key] = await loop.run_in_executor(self._threads, self._made, replica)
                break
            except Exception as error:
                logging.getLogger("aioengine.fleet").warning(
                    "Ray's head does not say where a replica is: %s", type(error).__name__
                )
                await asyncio.sleep(ASK_SECONDS)
        del self._asking[key]
        self._take()

    def _made(self, replica: Any) -> Any:
        try:
            return super().create_replica_wrapper(replica)
        except ValueError:  # it has died
            return None

    def create_replica_wrapper(self, replica: Any) -> Any:
        if replica.replica_id not in self._found:
            return super().create_replica_wrapper(replica)
        found = self._found[replica.replica_id]
        if found is None:
            raise ValueError("its actor is gone")
        return found

    def update_replicas(self, replicas: list[Any]) -> None:
        super().update_replicas(replicas)
        replicas_changed(self.app_name, {replica.replica_id.unique_id for replica in replicas})

    async def choose_replicas(
        self, candidate_replicas: list[Any], pending_request: Any = None
    ) -> list[list[Any]]:
        to = None
        if pending_request is not None:
            to = pending_request.kwargs.get("to")
            # Serve asks again at once, and for ever, if nobody has told it that there are no better choices.
            pending_request.routing_context.should_backoff = True
        named = [replica for replica in candidate_replicas if replica.replica_id.unique_id == to]
        return [named or list(candidate_replicas)]
