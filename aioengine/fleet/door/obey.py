"""A Serve request router that sends each call to the replica that its caller names, because the door does the
routing."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from typing import Any

from ray.serve.request_router import RequestRouter

from aioengine.fleet.door.discovery import replicas_changed

ROUTER_PATH = f"{__name__}:ObeyingRouter"
ASK_SECONDS = 1.0
"""Seconds between two questions to Ray's head for a replica's actor, if it does not answer."""


class ObeyingRouter(RequestRouter):  # type: ignore[misc] # Ray has no types for it
    """Chooses the replica that the keyword ``to`` names, or any replica without it.

    Serve's router asks Ray's head for the actor of each new replica, and waits for the answer: for a minute
    if the head hangs. All streams of the door would stand still, because this router runs on its event loop.
    So a thread asks first.

    Ray sends this class by value, with copies of the module's variables, so state must be elsewhere.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        super().initialize_state(**kwargs)
        self._wanted: Sequence[Any] = ()
        """The replicas that there are, as Serve's controller has last said."""
        self._asking: asyncio.Task[None] | None = None
        self._found: dict[Any, Any] = {}
        """New replicas that the head was asked for, by id; None: it does not know them any more."""

    def _update_running_replicas(self, running_replicas: Sequence[Any]) -> None:
        self._wanted = running_replicas
        # Where routers have a loop of their own, nobody minds that they wait.
        own_loop = os.environ.get("RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP") != "0"
        if own_loop or (self._asking is None and not self._new()):
            super()._update_running_replicas(running_replicas)
        elif self._asking is None:
            self._asking = asyncio.get_running_loop().create_task(self._ask())

    def _new(self) -> list[Any]:
        known = self._replicas.keys() | self._found.keys()
        return [replica for replica in self._wanted if replica.replica_id not in known]

    async def _ask(self) -> None:
        while new := self._new():
            try:
                for replica in new:
                    made = await asyncio.to_thread(self._made, replica)
                    self._found[replica.replica_id] = made
            except Exception as error:
                logging.getLogger("aioengine.fleet").warning(
                    "Ray's head does not say where a replica is: %s", type(error).__name__
                )
                await asyncio.sleep(ASK_SECONDS)
        self._asking = None
        super()._update_running_replicas(self._wanted)
        self._found.clear()

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
        to = None if pending_request is None else pending_request.kwargs.get("to")
        named = [replica for replica in candidate_replicas if replica.replica_id.unique_id == to]
        return [named or list(candidate_replicas)]
