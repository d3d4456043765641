"""What a gateway says of replicas that are missing: its state, and the numbers that an alert compares."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.engine_fixtures import Tiny
from support.fleet_here import FleetHere, fleet_here, small_engine

from aioengine.fleet.config import FleetConfig

pytest.importorskip("ray.serve", reason="Ray has no wheel for this system or Python")


async def said(fleet: FleetHere) -> tuple[str, int, int]:
    """Return its state, how many replicas it wants, and how many take requests."""
    text, _ = await asyncio.to_thread(fleet.client.metrics.expose, "text/plain")
    families = {family.name: family.samples for family in text_string_to_metric_families(text.decode())}
    states = [s for s in families["aioengine_engine_state"] if s.labels["replica"] == "door"]
    [state] = [sample.labels["state"] for sample in states if sample.value]
    [wanted] = families["aioengine_fleet_replicas_wanted"]
    return state, int(wanted.value), sum(int(s.value) for s in families.get("aioengine_fleet_replica_up", ()))


@pytest.mark.parametrize(
    ("autoscale", "one_dies", "one_is_taken_away", "both_are_gone"),
    [
        (None, ("degraded", 2, 1), ("degraded", 2, 1), ("starting", 2, 0)),
        ("waiting_work:least=2,most=4", ("degraded", 2, 1), ("degraded", 2, 1), ("starting", 2, 0)),
        ("waiting_work:least=1,most=4", ("degraded", 2, 1), ("ready", 1, 1), ("starting", 1, 0)),
        ("waiting_work:least=0,most=4", ("degraded", 2, 1), ("ready", 1, 1), ("ready", 0, 0)),
    ],
)
async def test_what_is_missing_is_said(
    autoscale: str | None,
    one_dies: tuple[str, int, int],
    one_is_taken_away: tuple[str, int, int],
    both_are_gone: tuple[str, int, int],
    tiny_text: Tiny,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = FleetConfig(engine=small_engine(tiny_text), replicas=2, autoscale=autoscale)
    async with fleet_here(config, monkeypatch) as fleet:
        members = fleet.client.members
        assert await said(fleet) == ("ready", 2, 2)
        monkeypatch.setattr(members, "_reopen", lambda replica: asyncio.sleep(0))
        channel = members.channel("r1")
        assert channel is not None
        members._lose(channel, "lost", "for this test")
        assert await said(fleet) == one_dies
        members._replicas_are({"r0"})
        assert await said(fleet) == one_is_taken_away
        members._replicas_are(set())
        assert await said(fleet) == both_are_gone
