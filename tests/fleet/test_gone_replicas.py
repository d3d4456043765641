"""Calls for a replica that is gone: Ray Serve sends them to another one, which must not take them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.engine_fixtures import Tiny, greedy
from support.fleet_here import fleet_here, small_engine

from aioengine.fleet.config import FleetConfig
from aioengine.fleet.wire import ChannelName

pytest.importorskip("ray.serve", reason="Ray has no wheel for this system or Python")

PROMPT = [5, 6, 7, 8]


async def test_a_channel_for_another_ends_no_requests(
    tiny_text: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = FleetConfig(engine=small_engine(tiny_text), replicas=1)
    async with fleet_here(config, monkeypatch) as fleet:
        replica, gateway = fleet.replicas["r0"], fleet.client.members.gateway
        whole = (await fleet.client.complete(PROMPT, greedy(20))).token_ids
        tokens: list[int] = []
        async for output in fleet.client.generate(PROMPT, greedy(20)):
            if not tokens:
                with pytest.raises(LookupError, match="replica gone is gone"):
                    await anext(replica.channel(ChannelName(gateway, 1), to="gone"))
            tokens += output.token_ids_delta
        assert tokens == whole
        assert (await fleet.client.complete(PROMPT, greedy(20))).token_ids == whole
        assert not fleet.client.members.losses


CALLS: list[tuple[str, tuple[Any, ...]]] = [
    ("adapter", ("load", {"name": "sql", "path": "a"})),
    ("submit", (ChannelName("gateway", 1), b"")),
    ("scrape", ()),
    ("describe", ()),
    ("drain", (True,)),
]


async def test_no_call_is_answered_in_its_place(
    tiny_text: Tiny, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(adapters)
    async with fleet_here(FleetConfig(engine=small_engine(tiny_text), replicas=1), monkeypatch) as fleet:
        replica = fleet.replicas["r0"]
        for method, arguments in CALLS:
            with pytest.raises(LookupError, match="the call came to replica own"):
                await getattr(replica, method)(*arguments, to="gone")
        assert (await replica.describe(to="own"))["state"] == "running"
        assert not replica.engine.adapters()
