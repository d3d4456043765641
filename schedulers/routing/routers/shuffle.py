"""Shuffle sharding."""

from __future__ import annotations

from aioengine.schedulers.routing.interface import FleetView, Route, RouteRequest, RouterPolicy
from aioengine.schedulers.routing.routers.common import RendezvousOrder, by_load, candidates


class ShuffleSharding(RouterPolicy):
    """Each tenant has ``shards`` replicas, chosen by hash, and uses the least loaded of them. If a tenant
    kills or floods its replicas, most other tenants still have a replica that it cannot reach. For requests
    without a tenant, the adapter takes its place.

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
            # The request itself may be the cause: it must not be tried on all replicas.
            return Route(reject="the replicas of this tenant have failed", reason="shard")
        return Route(by_load(found), reason="shard is down")
