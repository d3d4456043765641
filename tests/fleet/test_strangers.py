"""What clients make up: names of adapters that do not exist, and ids of requests."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from support.fleet_cases import request
from support.fleet_process import needs_ray
from support.registry_actor import RegistryActor
from support.small_fleet import client_of, join
from support.waiting import until

from aioengine import EngineConfig
from aioengine.errors import RequestInvalid
from aioengine.fleet.config import FleetConfig
from aioengine.fleet.gateway import client as gateway_client
from aioengine.fleet.gateway.adapters import FleetAdapters
from aioengine.fleet.gateway.dispatcher import Dispatcher
from aioengine.fleet.gateway.members import Members
from aioengine.fleet.gateway.metrics import GATEWAY, FleetMetrics

needs_ray()

NAMES = [f"made-up-{number}" for number in range(20)]


def config_of(**fields: Any) -> FleetConfig:
    return FleetConfig(engine=EngineConfig(model="tiny"), adapters={"real": "real"}, **fields)


def test_names_of_adapters_that_do_not_exist_get_no_series() -> None:
    """Not even while requests for them are on their way to a replica, which is then expected to load them."""
    members = Members(config_of(), None, gateway="gateway")
    join(members, "r0")
    metrics = FleetMetrics(members, Dispatcher(members), lambda: "running")
    for name in NAMES:
        members.state.sent(request(name, name), "r0")
    assert members.state.view.adapters[NAMES[0]].holders == {"r0"}
    assert "made-up" not in str(metrics.families(GATEWAY))


async def test_no_plan_has_them_loaded() -> None:
    asked: list[str] = []

    async def remote(action: str, arguments: dict[str, Any], to: str) -> None:
        if action == "load":
            asked.append(arguments["name"])

    handle = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=remote))
    config = config_of(placement="hrw", placement_seconds=0.01)
    members = Members(config, handle, gateway="gateway")
    join(members, "r0")
    adapters = FleetAdapters(config, members)
    await adapters.start_adapters(RegistryActor())
    for name in (*NAMES, "real"):
        members.state.sent(request(name, name), "r0")
    await until(lambda: bool(asked))
    await adapters.stop_adapters()
    assert set(asked) == {"real"}
    assert not any(members.state.view.adapters[name].target_holders for name in NAMES)


async def test_one_id_is_given_to_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where two ask for it while the first one is still being prepared."""
    client = client_of()
    join(client.members, "r0")

    async def tokenize(*_: Any, **__: Any) -> list[int]:
        await asyncio.sleep(0)
        return [5]

    monkeypatch.setattr(gateway_client, "tokenize", tokenize)
    outputs = [client.generate([5], request_id="same") for _ in range(3)]
    works = [asyncio.ensure_future(anext(output)) for output in outputs]
    await asyncio.wait(works, return_when=asyncio.FIRST_COMPLETED)
    await asyncio.sleep(0.01)
    refused = [work for work in works if work.done()]
    assert len(refused) == 2
    for work in refused:
        with pytest.raises(RequestInvalid, match="in use"):
            await work
    assert set(client._ids) == {"same"}, "who was refused does not take the id from who has it"
    for work in works:
        work.cancel()
    await asyncio.wait(works)
    assert not client._ids


async def test_gateways_make_up_different_ids() -> None:
    """Requests of both may run on one replica."""
    ids = set[str]()
    for _ in range(2):
        client = client_of()
        join(client.members, "r0")
        for _ in range(3):
            work = asyncio.ensure_future(anext(client.generate([5])))
            await asyncio.sleep(0.001)
            ids |= client._ids.keys()
            work.cancel()
            await asyncio.wait([work])
    assert len(ids) == 6
