"""Prefix: the replica that has most of the prompt cached, unless the load is uneven."""

from __future__ import annotations

from aioengine.schedulers.routing.interface import FleetView, Route, RouteRequest, RouterPolicy
from aioengine.schedulers.routing.routers.common import MAX_NAMED, by_load, cached_tokens, candidates


class Prefix(RouterPolicy):
    """The replica that has the longest prefix of the prompt cached, if that is at least ``share`` of the
    prompt and the replica has at most ``slack`` requests more than the least loaded one, which is taken
    otherwise.

    Args:
        share: Smallest cached share of the prompt that matters, between 0 and 1.
        slack: Number of requests that it may have more than the least loaded replica.
    """

    source = (
        "SGLang's cache-aware router; Srivatsa et al., 'Preble: Efficient Distributed Prompt Scheduling for "
        "LLM Serving', 2024"
    )
    worst_case = "as least_loaded, and up to slack requests more wait before one; adapters are not looked at"

    def __init__(self, share: float = 0.3, slack: int = 8) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"share={share}: must be between 0 and 1")
        if slack < 0:
            raise ValueError(f"slack={slack}: must be at least 0")
        self._share = share
        self._slack = slack

    def route(self, request: RouteRequest, view: FleetView) -> Route:
        found = candidates(request, view)
        if not found:
            return Route()
        cached = cached_tokens(request, view)
        least = min(replica.waiting + replica.running for replica in found)
        enough = self._share * request.prompt_tokens
        having = [
            replica
            for replica in found
            if cached.get(replica.replica_id, 0) >= max(enough, 1)
            and replica.waiting + replica.running <= least + self._slack
        ]
        if not having:
            return Route(by_load(found), reason="load")
        having.sort(key=lambda replica: (-cached[replica.replica_id], replica.waiting + replica.running))
        return Route([replica.replica_id for replica in having[:MAX_NAMED]], reason="prefix")
