"""A replica that comes, or comes back, gets no request before it knows the fleet's adapters."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from support.engine_fixtures import Tiny, greedy
from support.fleet_here import fleet_here, small_engine

from aioengine.fleet.config import FleetConfig

pytest.importorskip("ray.serve", reason="Ray has no wheel for this system or Python")

PROMPT = [5, 6, 7, 8]


async def test_requests_that_wait_for_it_get_the_current_version(
    tiny_text: Tiny, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gateway has lost a replica, and replaced an adapter on the other one, which it then lost for good."""
    config = FleetConfig(engine=small_engine(tiny_text), replicas=2, adapters={"sql": str(adapters / "a")})
    async with fleet_here(config, monkeypatch) as fleet:
        client, members = fleet.client, fleet.client.members
        monkeypatch.setattr(members, "_reopen", lambda replica: asyncio.sleep(0))

        def lose(replica: str) -> None:
            channel: Any = members.channel(replica)
            members._lose(channel, "lost", "for this test")

        lose("r0")
        assert (await client.load_adapter("sql", str(adapters / "b"), replace=True)).version == 2
        lose("r1")
        answer = asyncio.create_task(client.complete(PROMPT, greedy(6), adapter="sql"))
        await asyncio.sleep(0)
        members._open("r0")
        assert (await answer).token_ids == (
            await fleet.replicas["r1"].engine.complete(PROMPT, greedy(6), adapter="sql")
        ).token_ids


async def test_a_replica_that_knows_the_adapters_gets_requests_at_once(
    tiny_text: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has reported while it was told of them: the first requests do not wait for its next report."""
    config = FleetConfig(engine=small_engine(tiny_text), replicas=2)
    async with fleet_here(config, monkeypatch) as fleet:
        client, members = fleet.client, fleet.client.members
        member = members.members["r0"]
        assert member.status is not None
        member.ready = False
        members._report(member, member.status, None)
        assert [view.replica_id for view in members.state.view.accepting] == ["r1"]
        await client._sync(member)
        assert {view.replica_id for view in members.state.view.accepting} == {"r0", "r1"}
