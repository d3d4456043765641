"""Shuffle sharding."""

from __future__ import annotations

from aioengine.schedulers.routing.interface import FleetView, Route, RouteRequest, RouterPolicy
from aioengine.schedulers.routing.routers.common import RendezvousOrder, by_load, candidates


class ShuffleSharding(RouterPolicy):
    """Each tenant has ``shards`` replicas of its own choosing by hash, and uses the least loaded of them. A
    tenant that kills or floods its replicas leaves most others with one that it cannot reach. Requests
    without a tenant go by their adapter.

    Args:
        shards: Replicas for each tenant.
    """

    source = "MacCarthaigh, 'Workload isolation using shuffle-sharding', Amazon Builders' Library, 2019"
    worst_case = (
        "a hostile tenant takes its shards down with it; of n replicas, another tenant shares all of them "
        "with probability 1 / C(n, shards); a tenant gets no more than its shards can do"
    )

    def __init__(self, shards: int = 2) -> None:
        if shards < 1:
            raise ValueError(f"shards={shards}: must be at least 1")
        self._shards = shards
        self._order = RendezvousOrder()

    def route(self, request: RouteRequest, view: FleetView) -> Route:
        key = request.tenant if request.tenant is not None else request.adapter or ""
        own = self._order.of(key, view)[: self._shards]
        found = candidates(request, view)
        mine = [replica for replica in found if replica.replica_id in own]
        if mine:
            return Route(by_load(mine), reason="shard")
        if all(name in request.tried for name in own):
            # It may be the request that fails them: it must not be tried on everybody's.
            return Route(reject="the replicas of this tenant have failed", reason="shard")
        return Route(by_load(found), reason="shard is down")
