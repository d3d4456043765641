"""Round robin."""

from __future__ import annotations

from aioengine.schedulers.routing.interface import FleetView, Route, RouteRequest, RouterPolicy
from aioengine.schedulers.routing.routers.common import MAX_NAMED, candidates


class RoundRobin(RouterPolicy):
    """Each request goes to the next replica in turn, whatever its adapter or prompt."""

    source = "the classic; the baseline of every balancer"
    worst_case = (
        "long requests meet on one replica while others idle; every adapter is loaded on every replica"
    )

    def __init__(self) -> None:
        self._turn = 0

    def route(self, request: RouteRequest, view: FleetView) -> Route:
        found = candidates(request, view)
        if not found:
            return Route()
        start = self._turn % len(found)
        self._turn += 1
        order = (*found[start:], *found[:start])
        return Route([replica.replica_id for replica in order[:MAX_NAMED]], reason="turn")
