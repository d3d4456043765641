"""Least loaded."""

from __future__ import annotations

from aioengine.schedulers.routing.interface import FleetView, Route, RouteRequest, RouterPolicy
from aioengine.schedulers.routing.routers.common import by_load, candidates


class LeastLoaded(RouterPolicy):
    """The replica with the fewest requests, where a waiting one counts as four; equal replicas take turns.

    The safe router that others fall back to."""

    source = "vLLM's balancer between data-parallel ranks: 4 x waiting + running"
    worst_case = "a request is sent where its adapter must be loaded although a holder was as good"

    def __init__(self) -> None:
        self._turn = 0

    def route(self, request: RouteRequest, view: FleetView) -> Route:
        found = candidates(request, view)
        if not found:
            return Route()
        start = self._turn % len(found)
        self._turn += 1
        return Route(by_load((*found[start:], *found[:start])), reason="load")
