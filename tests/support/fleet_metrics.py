"""The metrics of a door that has no replicas yet, or made-up ones."""

from __future__ import annotations

import asyncio

from prometheus_client.metrics_core import Metric

from aioengine import EngineConfig
from aioengine.fleet.config import FleetConfig
from aioengine.fleet.door.dispatcher import Dispatcher
from aioengine.fleet.door.members import Members
from aioengine.fleet.door.metrics import FleetMetrics
from aioengine.schedulers.routing import ReplicaLimits, Report, Tiers


def door(*replicas: str, adapters: tuple[str, ...] = ()) -> FleetMetrics:
    """Each replica has said once that it holds ``adapters``; none can be asked. Needs a running loop."""
    config = FleetConfig(engine=EngineConfig(model="tiny", name="fleet"), replicas=2)
    members = Members(config, None, door="door-1")
    for replica in replicas:
        members.state.join(replica, ReplicaLimits(2, 4, 8, 1000))
        members.state.report(replica, Report(0.0, 0, 0, 0, 0, 0, 0, 1000, {}, tiers=Tiers(slot=adapters)))
    metrics = FleetMetrics(members, Dispatcher(members), lambda: "running")
    metrics.start()
    return metrics


def door_families() -> list[Metric]:
    """What a door exports of its own."""

    async def collect() -> list[Metric]:
        return list(door("one", adapters=("sql",)).own.collect())

    return asyncio.run(collect())
