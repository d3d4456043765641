"""The metrics of a gateway that has no replicas yet, or made-up ones."""

from __future__ import annotations

import asyncio

from prometheus_client.metrics_core import Metric

from aioengine import EngineConfig
from aioengine.fleet.config import FleetConfig
from aioengine.fleet.gateway.dispatcher import Dispatcher
from aioengine.fleet.gateway.members import Members
from aioengine.fleet.gateway.metrics import GATEWAY, FleetMetrics
from aioengine.metrics.families.exposition import to_metric
from aioengine.schedulers.routing import ReplicaLimits, Report, Tiers


def gateway(*replicas: str, adapters: tuple[str, ...] = ()) -> FleetMetrics:
    """Each replica has said once that it holds ``adapters``; none can be asked. Needs a running loop."""
    config = FleetConfig(engine=EngineConfig(model="tiny", name="fleet"), replicas=2)
    members = Members(config, None, gateway="gateway-1")
    for replica in replicas:
        members.state.join(replica, ReplicaLimits(2, 8, 1000))
        members.state.report(replica, Report(0.0, 0, 0, 0, 0, 0, 1000, {}, tiers=Tiers(slot=adapters)))
    metrics = FleetMetrics(members, Dispatcher(members), lambda: "running")
    metrics.start()
    return metrics


def gateway_families() -> list[Metric]:
    """What a gateway exports of its own."""

    async def collect() -> list[Metric]:
        return [to_metric(family) for family in gateway("one", adapters=("sql",)).families(GATEWAY)]

    return asyncio.run(collect())
