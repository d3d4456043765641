"""Holder: a replica that holds the adapter."""

from __future__ import annotations

from aioengine.schedulers.routing.interface import FleetView, Route, RouteRequest, RouterPolicy
from aioengine.schedulers.routing.routers.common import by_load, candidates


class Holder(RouterPolicy):
    """The least loaded replica that holds the adapter; the least loaded of all if none does, or if
    ``spill`` requests or more wait on every holder.

    Args:
        spill: Requests that may wait on a holder before other replicas are used, too; 0: any number.
    """

    source = "Ray Serve's model multiplexing, and gateways that look at what is loaded"
    worst_case = (
        "with spill=0 all users of one adapter share one replica while the others idle (ray #48741); with a "
        "bound, as many requests wait on a holder before another replica is used"
    )

    def __init__(self, spill: int = 0) -> None:
        if spill < 0:
            raise ValueError(f"spill={spill}: must be at least 0")
        self._spill = spill

    def route(self, request: RouteRequest, view: FleetView) -> Route:
        found = candidates(request, view)
        adapter = None if request.adapter is None else view.adapters.get(request.adapter)
        if adapter is not None:
            holders = adapter.holders
            having = [replica for replica in found if replica.replica_id in holders]
            if self._spill:
                having = [replica for replica in having if replica.waiting < self._spill]
            if having:
                return Route(by_load(having), reason="holder")
        return Route(by_load(found), reason="load")
