"""A Serve request router that sends each call to the replica that its caller names, because the door does the
routing."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import RequestRouter

from aioengine.fleet.door.discovery import replicas_changed

ROUTER_PATH = f"{__name__}:ObeyingRouter"


class ObeyingRouter(RequestRouter):  # type: ignore[misc] # Ray has no types for it
    """Chooses the replica that the keyword ``to`` names, or any replica without it.

    Ray sends this class by value, with copies of the module's variables, so state must be elsewhere.
    """

    def update_replicas(self, replicas: list[Any]) -> None:
        super().update_replicas(replicas)
        replicas_changed(self.app_name, {replica.replica_id.unique_id for replica in replicas})

    async def choose_replicas(
        self, candidate_replicas: list[Any], pending_request: Any = None
    ) -> list[list[Any]]:
        to = None if pending_request is None else pending_request.kwargs.get("to")
        named = [replica for replica in candidate_replicas if replica.replica_id.unique_id == to]
        return [named or list(candidate_replicas)]
