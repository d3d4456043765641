"""A scrape of a whole fleet whose replicas are not all of one version."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.small_fleet import join

from aioengine import EngineConfig
from aioengine.fleet.config import FleetConfig
from aioengine.fleet.gateway.dispatcher import Dispatcher
from aioengine.fleet.gateway.members import Members
from aioengine.fleet.gateway.metrics import FleetMetrics
from aioengine.metrics.families.definitions import ALL
from aioengine.metrics.families.storage import Family

RUNNING = "aioengine_requests_running"


def encoded(family: object) -> bytes:
    return msgspec.msgpack.encode([family])


def running(**changed: Any) -> Family:
    """What a replica says of its running requests, with another definition of the metric."""
    definition = ALL["requests_running"]
    labels = ("engine", *("x" for _ in changed.get("labels", definition.labels)))
    return Family(definition._replace(**changed), [(labels, 3.0)])


@pytest.mark.parametrize(
    "other",
    [
        b"\xc1",
        encoded({"name": "requests_running", "value": 3}),
        encoded((*running(), "more")),
        encoded(running(labels=(*ALL["requests_running"].labels, "new"))),
    ],
    ids=["no message", "another form", "more fields", "another label"],
)
async def test_what_cannot_be_read_of_one_replica_is_left_out(other: bytes) -> None:
    """The other ones, and the gateway itself, are scraped as ever."""

    async def scrape(to: str) -> bytes:
        await asyncio.sleep(0.01 if to == "r0" else 0.0)
        return {"r0": encoded(running()), "r1": other}[to]

    handle = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=scrape))
    members = Members(FleetConfig(engine=EngineConfig(model="tiny")), handle, gateway="gateway")
    for name in ("r0", "r1"):
        join(members, name)
    metrics = FleetMetrics(members, Dispatcher(members), lambda: "running")
    metrics.start()
    text, _ = await asyncio.to_thread(metrics.expose, "text/plain")
    families = {family.name: family.samples for family in text_string_to_metric_families(text.decode())}
    [sample] = families[RUNNING]
    assert (sample.labels["replica"], sample.value) == ("r0", 3.0)
    assert "aioengine_engine_state" in families
