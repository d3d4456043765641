"""Replaced versions at a gateway: who gets their requests, and what their errors say."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

import pytest
from support.adapter_infos import adapter_info
from support.small_fleet import join

from aioengine import EngineConfig, SamplingParams
from aioengine.errors import (
    AdapterChanged,
    AdapterNotFound,
    AioEngineError,
    EngineDead,
    EngineOverloaded,
    EngineStopped,
)
from aioengine.executors.process.wire import pack_error
from aioengine.fleet.config import FleetConfig
from aioengine.fleet.gateway.adapters import FleetAdapters
from aioengine.fleet.gateway.call import Call
from aioengine.fleet.gateway.dispatcher import Dispatcher
from aioengine.fleet.gateway.entries import listed
from aioengine.fleet.gateway.members import Members
from aioengine.fleet.registry import Entry
from aioengine.fleet.wire import Delta, Residency, gone
from aioengine.info import AdapterInfo, AdapterLocation
from aioengine.lab.simulation.clock import run_in_virtual_time
from aioengine.request import RequestOptions, Wanted

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


def members_of(router: str = "affinity", /, **held: list[AdapterInfo]) -> tuple[Members, dict[str, Any]]:
    members = Members(FleetConfig(engine=EngineConfig(model="tiny"), router=router), None, gateway="gateway")
    channels = {name: join(members, name) for name in held}
    for name, infos in held.items():
        members.members[name].residency = Residency([], infos[-1:], infos[:-1])
    return members, channels


def call_of(*versions: str) -> Call:
    options = RequestOptions(adapter=versions[0])
    if len(versions) > 1:
        options = RequestOptions(adapter=dict.fromkeys(versions, 0.5))
    contents = {version: version.replace("sql@", "digest-") for version in versions if "@" in version}
    return Call(1, "r", [5, 6], SamplingParams(seed=1), options, 0.0, contents)


def dispatcher_of(members: Members) -> Dispatcher:
    """A dispatcher that knows of the second version of "sql"."""
    dispatcher = Dispatcher(members)
    dispatcher.digest_of = {"sql": "digest-2"}.get  # type: ignore[assignment]
    return dispatcher


@pytest.mark.parametrize("error", [EngineOverloaded("full", bound="server"), EngineStopped("it drains")])
async def test_the_only_replica_with_a_version_refuses(error: AioEngineError) -> None:
    """Its error is the answer, although others could be asked for anything else."""
    members, channels = members_of(r0=[info(1), info(2)], r1=[info(2)], r2=[])
    dispatcher, call = dispatcher_of(members), call_of("sql@1")
    await dispatcher.place(call)
    assert call.replica == "r0"
    members.on_delta(channels["r0"], call, Delta(1, error=pack_error(error)), 1.0)
    with pytest.raises(type(error)):
        await asyncio.wait_for(call.next(), 10)


@pytest.mark.parametrize("versions", [("sql@3",), ("sql@1", "sql@3")])
async def test_no_replica_has_all_versions(versions: tuple[str, ...]) -> None:
    members, _ = members_of(r0=[info(1)], r1=[info(2)])
    with pytest.raises(AdapterNotFound, match="gone"):
        await asyncio.wait_for(dispatcher_of(members).place(call_of(*versions)), 10)


@pytest.mark.parametrize("how", ["drained", "removed"])
def test_a_version_that_is_only_where_nothing_new_is_taken(how: str) -> None:
    """The answer comes at once, and says so."""

    async def main() -> None:
        members, channels = members_of(r0=[info(1)], r1=[info(2)])
        channels["r0"].leaving = how == "removed"
        members.members["r0"].status = SimpleNamespace(draining=how == "drained")  # type: ignore[assignment]
        members.state.drain("r0")
        with pytest.raises(AdapterNotFound, match="replaced"):
            await dispatcher_of(members).place(call_of("sql@1"))
        assert asyncio.get_running_loop().time() < 1.0

    run_in_virtual_time(main())


def test_a_version_is_waited_for_where_a_replica_has_just_come_back() -> None:
    async def main() -> None:
        members, _ = members_of(r0=[info(1)], r1=[info(2)])
        members.state.drain("r0")  # it is told of the fleet's adapters
        call = call_of("sql@1")
        placing = asyncio.ensure_future(dispatcher_of(members).place(call))
        await asyncio.sleep(2.0)
        assert not placing.done()
        members.state.drain("r0", False)
        members._tell_change()
        await placing
        assert call.replica == "r0"

    run_in_virtual_time(main())


@pytest.mark.parametrize("newer", [None, "disk", "cpu"])
def test_a_replaced_version_is_not_described_as_the_current_one(newer: AdapterLocation | None) -> None:
    """However much faster the place is that holds it."""
    held = [info(1, "slot")] + ([] if newer is None else [info(2, newer)])
    [found] = listed({"sql": Entry("sql", "sql/2", 2, "digest-2", earlier={1: "digest-1"})}, held)
    assert (found.version, found.path, found.digest) == (2, "sql/2", "digest-2")
    assert found.labels == (0 if newer is None else 2)


@pytest.mark.parametrize(
    ("wanted", "labels"),
    [("sql", 2), ("sql@2", 2), ("sql@1", 1), ({"sql@1": 0.5}, 1), ({"sql": 1.0, "a": 1.0}, 0), (None, 0)],
)
async def test_labels_are_those_of_the_version(wanted: Wanted, labels: int) -> None:
    gateway, _ = gateway_of(2, r0=[info(1), info(2)], r1=[info(1)])
    assert await gateway.head_labels(wanted) == labels


async def test_what_no_replica_has_read_is_read_for_its_labels() -> None:
    gateway, asked = gateway_of(2, r0=[], r1=[])
    assert await gateway.head_labels("sql") == 7
    assert asked == [("r0", "sql")]
    with pytest.raises(AdapterNotFound, match="gone"):
        await gateway.head_labels("sql@1")


async def test_labels_are_read_by_another_replica_if_one_is_lost() -> None:
    gateway, asked = gateway_of(2, {"r0"}, r0=[], r1=[])
    assert await gateway.head_labels("sql") == 7
    assert asked == [("r1", "sql")]
    gateway, _ = gateway_of(2, {"r0"}, r0=[])
    with pytest.raises(EngineStopped):
        await gateway.head_labels("sql")


def gateway_of(
    version: int, lost: Collection[str] = (), **held: list[AdapterInfo]
) -> tuple[FleetAdapters, list[tuple[str, str]]]:
    """A gateway whose fleet has this version of "sql", to replicas that have others, too; some are lost.
    What the others are told to load has 7 labels; also returns who was told to load which."""
    members, _ = members_of(**held)
    asked: list[tuple[str, str]] = []

    async def remote(action: str, arguments: dict[str, Any], to: str) -> AdapterInfo:
        assert action == "load"
        if to in lost:
            raise ConnectionError
        asked.append((to, arguments["name"]))
        return adapter_info(arguments["name"], labels=7)

    members.handle = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=remote))
    adapters = FleetAdapters(members.config, members)
    adapters.known.put(Entry("sql", f"sql/{version}", version, f"digest-{version}", earlier={1: "digest-1"}))
    return adapters, asked


# Calls that lose their replica


async def test_a_call_that_nobody_waits_for_is_not_sent() -> None:
    """It had lost its replica, and waited for another one."""
    members, _ = members_of(r0=[info(1)])
    dispatcher, call = Dispatcher(members), call_of("sql")
    await dispatcher.place(call)
    del members.members["r0"]
    members.state.leave("r0")
    members.on_loss(call, "r0", "lost")
    await asyncio.sleep(0)
    dispatcher.abandon(call)
    join(members, "r1")
    members._tell_change()
    await asyncio.gather(*members.background.tasks)
    assert call.replica is None and not members.state.in_flight


@pytest.mark.parametrize(
    ("error", "others", "ends"),
    [
        (gone("sql"), 5, None),  # a refusal is no loss
        (EngineStopped("it drains"), 5, None),
        (EngineDead("its engine has failed"), 4, EngineDead),  # with the request, maybe because of it
        (gone("sql"), 4, AdapterChanged),  # nobody has its content
    ],
    ids=["another content", "drained", "dead", "no content"],
)
async def test_refusals_do_not_use_up_the_limit_of_losses(
    error: AioEngineError, others: int, ends: type[AioEngineError] | None
) -> None:
    """A call has begun on a replica that is lost. Four others refuse it; there may be a fifth."""
    members, channels = members_of(**{f"r{number}": [] for number in range(others + 1)})
    dispatcher, call = Dispatcher(members), call_of("sql")
    await dispatcher.place(call)
    assert call.replica is not None
    members.on_delta(channels[call.replica], call, Delta(1, [9], content="one"), 1.0)
    assert (await call.next()).token_ids_delta == [9]
    first = call.replica
    members.state.leave(first)
    del members.members[first]
    members.on_loss(call, first, "lost")
    for _ in range(4):
        await asyncio.gather(*members.background.tasks)
        if call.ended:
            break
        members.on_delta(channels[call.replica], call, Delta(1, error=pack_error(error)), 1.0)
    await asyncio.gather(*members.background.tasks)
    if ends is None:
        assert not call.ended and call.replica is not None
        members.on_delta(channels[call.replica], call, Delta(1, [9], finish="length"), 1.0)
        assert (await call.next()).finished
    else:
        with pytest.raises(ends):
            await asyncio.wait_for(call.next(), 10)


@pytest.mark.parametrize("router", ["affinity", "shuffle"])
async def test_a_call_that_has_begun_goes_where_its_content_is(router: str) -> None:
    """If that is known, and the router may choose it; the others may have to read it, and find another."""
    has, no = ([adapter_info("sql", version=v, digest=d)] for v, d in ((5, "one"), (5, "two")))
    members, _ = members_of(router, r0=no, r1=no, r2=has, r3=no, r4=no)
    dispatcher, call = Dispatcher(members), call_of("sql")
    call.content = "one"
    call.take(Delta(1, [9]), 0.0)
    call.tried = frozenset({"r0"})
    await dispatcher.place(call)
    assert call.replica == "r2" or router == "shuffle"
    members.state.ended("1")
    members.members["r2"].residency = Residency([], no)
    call.tried = call.tried | {"r2"}
    await dispatcher.place(call)
    assert call.replica in ("r1", "r3", "r4")
