"""A Serve request router that sends each call to the replica that its caller names, because the gateway does
the routing."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import RequestRouter

from aioengine.fleet.gateway.discovery import replicas_changed

ROUTER_PATH = f"{__name__}:ObeyingRouter"


class ObeyingRouter(RequestRouter):  # type: ignore[misc] # Ray has no types for it
    """Chooses the replica that the keyword ``to`` names, or any replica without it."""

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
