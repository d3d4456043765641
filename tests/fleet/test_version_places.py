"""Replaced versions at a door: who gets their requests, and what their errors say."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from support.adapter_infos import adapter_info

from aioengine import EngineConfig, SamplingParams
from aioengine.errors import AdapterNotFound, AioEngineError, EngineOverloaded, EngineStopped
from aioengine.fleet.config import FleetConfig
from aioengine.fleet.door.call import Call
from aioengine.fleet.door.dispatcher import Dispatcher
from aioengine.fleet.door.entries import listed
from aioengine.fleet.door.members import Member, Members
from aioengine.fleet.registry import Entry
from aioengine.fleet.wire import Delta, Residency, pack_error
from aioengine.info import AdapterInfo, AdapterLocation
from aioengine.request import RequestOptions
from aioengine.schedulers.routing import ReplicaLimits
from aioengine.server.context import Context

pytest.importorskip("ray.exceptions", reason="Ray has no wheel for this system or Python")


def info(version: int, location: AdapterLocation = "cpu") -> AdapterInfo:
    return adapter_info(
        "sql",
        version=version,
        path=f"sql/{version}",
        digest=f"digest-{version}",
        labels=version,
        location=location,
    )


def members_of(**held: list[AdapterInfo]) -> tuple[Members, dict[str, Any]]:
    members = Members(FleetConfig(engine=EngineConfig(model="tiny")), None, door="door")
    channels: dict[str, Any] = {}
    for name, infos in held.items():
        channel: Any = SimpleNamespace(replica=name, calls={}, send=lambda order: None, leaving=False)
        members.members[name] = Member(channel, None)  # type: ignore[arg-type]
        members.members[name].residency = Residency([], infos)
        members.state.join(name, ReplicaLimits(slots=2, cpu_loras=4, max_running=8, kv_tokens=10_000))
        channels[name] = channel
    members.channel = channels.get  # type: ignore[assignment, method-assign]
    return members, channels


def call_of(*versions: str) -> Call:
    options = RequestOptions(adapter=versions[0])
    if len(versions) > 1:
        options = RequestOptions(mix=dict.fromkeys(versions, 0.5))
    return Call(1, "r", [5, 6], SamplingParams(seed=1), options, 0.0, versions)


@pytest.mark.parametrize("error", [EngineOverloaded("full", bound="server"), EngineStopped("it drains")])
async def test_the_only_replica_with_a_version_refuses(error: AioEngineError) -> None:
    """Its error is the answer, although others could be asked for anything else."""
    members, channels = members_of(r0=[info(1), info(2)], r1=[info(2)], r2=[])
    dispatcher, call = Dispatcher(members), call_of("sql@1")
    await dispatcher.place(call)
    assert call.replica == "r0"
    members.on_delta(channels["r0"], call, Delta(1, error=pack_error(error)), 1.0)
    with pytest.raises(type(error)):
        await asyncio.wait_for(call.next(), 10)


@pytest.mark.parametrize("versions", [("sql@3",), ("sql@1", "sql@2")])
async def test_no_replica_has_all_versions(versions: tuple[str, ...]) -> None:
    members, _ = members_of(r0=[info(1)], r1=[info(2)])
    with pytest.raises(AdapterNotFound, match="gone"):
        await asyncio.wait_for(Dispatcher(members).place(call_of(*versions)), 10)


@pytest.mark.parametrize("newer", [None, "disk", "cpu"])
def test_a_replaced_version_is_not_described_as_the_current_one(newer: AdapterLocation | None) -> None:
    """However much faster the place is that holds it."""
    held = [info(1, "slot")] + ([] if newer is None else [info(2, newer)])
    [found] = listed([Entry("sql", "sql/2", 2, "digest-2")], held)
    assert (found.version, found.path, found.digest) == (2, "sql/2", "digest-2")
    assert found.labels == (0 if newer is None else 2)


async def test_an_adapter_that_no_replica_holds_is_read_for_its_labels() -> None:
    async def load_adapter(name: str) -> AdapterInfo:
        return info(2)

    described = {each.name: each for each in listed([Entry("sql", "sql/2", 2, "digest-2")], [])}
    engine = SimpleNamespace(find_adapter=described.get, load_adapter=load_adapter)
    server: Any = SimpleNamespace(engine=engine)
    assert await Context.head_labels(server, "sql") == info(2).labels
