"""Rendezvous hashing with bounded load."""

from __future__ import annotations

from math import ceil

from aioengine.schedulers.routing.interface import FleetView, Route, RouteRequest, RouterPolicy
from aioengine.schedulers.routing.routers.common import MAX_NAMED, RendezvousOrder, by_load, candidates


class Rendezvous(RouterPolicy):
    """Each adapter has an order of all replicas by hash, and a request goes to the first that has less than
    ``bound`` times the mean number of requests. Needs no knowledge of which replica holds which adapter.

    Args:
        bound: At least 1: how far above the mean a replica's load may be.
    """

    source = (
        "Thaler and Ravishankar, 1998; the bound is Mirrokni, Thorup and Zadimoghaddam, 'Consistent Hashing "
        "with Bounded Loads', SODA 2018"
    )
    worst_case = (
        "no replica has more than bound x the mean of requests, rounded up; a hot adapter is on as many "
        "replicas as that takes, and its tail moves with the load of others"
    )

    def __init__(self, bound: float = 1.25) -> None:
        if not 1 <= bound < float("inf"):
            raise ValueError(f"bound={bound}: must be at least 1")
        self._bound = bound
        self._order = RendezvousOrder()

    def route(self, request: RouteRequest, view: FleetView) -> Route:
        found = candidates(request, view)
        if not found:
            return Route()
        if request.adapter is None:
            return Route(by_load(found), reason="load")
        loads = {replica.replica_id: replica.waiting + replica.running for replica in found}
        most = ceil(self._bound * (sum(loads.values()) + 1) / len(loads))
        order = [name for name in self._order.of(request.adapter, view) if name in loads]
        named = [name for name in order if loads[name] < most][:MAX_NAMED]
        return Route(named or order[:MAX_NAMED], reason="home" if named[:1] == order[:1] else "bounded")
