"""Two gateways that change one adapter at the same time, and a registry that hangs: a change is made on all
replicas or on none, and no replica keeps what was prepared for one that failed."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from support.adapter_infos import adapter_info
from support.fleet_process import needs_ray
from support.registry_actor import FarRegistry, RegistryActor
from support.small_fleet import Gateway, replica

from aioengine.errors import AdapterLoadError
from aioengine.fleet.gateway.adapters import ANSWER_SECONDS
from aioengine.fleet.wire import Residency
from aioengine.info import AdapterInfo
from aioengine.lab.simulation.clock import run_in_virtual_time

needs_ray()


async def gateway_to(ones: list[Any], registry: Any, before: Any = None) -> Gateway:
    """Return a gateway to two replicas that have the adapter in memory, and so read a new version."""
    made = Gateway(ones[0], before, ones[1])
    for member in made.members.members.values():
        member.residency = Residency([], [adapter_info("sql")])
    await made.adapters.start_adapters(registry)
    return made


async def replicas_that_read(*seconds: float) -> list[Any]:
    ones = [await replica() for _ in seconds]
    for one, each in zip(ones, seconds, strict=True):
        one.engine.seconds = each
    return ones


@pytest.mark.parametrize("reads", [(1.0, 100.0), (100.0, 1.0), (100.0, 100.0)])
@pytest.mark.parametrize("after", [0.0, 0.5, 50.0])
@pytest.mark.parametrize("names", ["ab", "ba"])
def test_one_of_two_that_prepare_goes_on(reads: tuple[float, float], after: float, names: str) -> None:
    """Whatever the other one has read by then is dropped."""

    async def main() -> None:
        registry, ones = RegistryActor(), await replicas_that_read(*reads)
        gateways, changes = [await gateway_to(ones, registry) for _ in names], []
        for name, gateway in zip(names, gateways, strict=True):
            gateway.members.gateway = name
            changes.append(gateway.adapters.load_adapter("sql", name, replace=True))
        first = asyncio.ensure_future(changes[0])
        await asyncio.sleep(after)
        ends = await asyncio.gather(first, changes[1], return_exceptions=True)
        [failed] = [end for end in ends if isinstance(end, AdapterLoadError)]
        [(name, made)] = [(n, end) for n, end in zip(names, ends, strict=True) if end is not failed]
        assert failed.transient and "repeat the change" in str(failed)
        await asyncio.sleep(200.0)
        [entry] = await registry.entries.remote()
        assert isinstance(made, AdapterInfo) and (entry.version, made.version) == (1, 1)
        assert [(one.engine.has, one.engine.prepared) for one in ones] == [({"sql": name}, {})] * 2
        for gateway in gateways:
            await gateway.adapters.stop_adapters()

    run_in_virtual_time(main())


@pytest.mark.parametrize("what", ["pin", "unload"])
def test_a_change_of_what_another_gateway_has_replaced_is_refused(what: str) -> None:
    async def main() -> None:
        registry, ones = RegistryActor(), await replicas_that_read(0.0, 0.0)
        slow = FarRegistry(registry)
        first, second = await gateway_to(ones, slow), await gateway_to(ones, registry)
        await second.adapters.load_adapter("sql", "old")
        slow.seconds["change"] = 5.0
        change = first.adapters.pin_adapter if what == "pin" else first.adapters.unload_adapter
        late = asyncio.ensure_future(change("sql"))
        await asyncio.sleep(1.0)
        await second.adapters.load_adapter("sql", "new", replace=True)
        with pytest.raises(AdapterLoadError, match="another gateway has changed it meanwhile"):
            await late
        assert [(one.engine.has, one.engine.pinned) for one in ones] == [({"sql": "new"}, set())] * 2
        await change("sql")
        entries = await registry.entries.remote()
        assert [(entry.version, entry.pinned) for entry in entries] == [(2, True)] * (what == "pin")
        for gateway in (first, second):
            await gateway.adapters.stop_adapters()

    run_in_virtual_time(main())


@pytest.mark.parametrize("call", ["changes", "change"])
def test_a_registry_that_hangs_is_said(call: str) -> None:
    """Ray does not restart it: a change must not wait for ever, and no replica has it."""

    async def main() -> None:
        loop, ones = asyncio.get_running_loop(), await replicas_that_read(1.0, 1.0)
        registry = FarRegistry(RegistryActor())
        gateway = await gateway_to(ones, registry)
        await gateway.adapters.load_adapter("sql", "old")
        had, begun = [dict(one.engine.has) for one in ones], loop.time()
        registry.seconds[call] = 1e6
        with pytest.raises(AdapterLoadError, match="has not answered for 30 s; repeat") as told:
            await gateway.adapters.load_adapter("sql", "new", replace=True)
        assert told.value.transient and loop.time() - begun <= ANSWER_SECONDS + 1.0
        assert [(one.engine.has, one.engine.prepared) for one in ones] == [(has, {}) for has in had]
        registry.seconds.clear()
        assert (await gateway.adapters.load_adapter("sql", "new", replace=True)).version > 1
        assert [one.engine.has for one in ones] == [{"sql": "new"}] * 2
        await gateway.adapters.stop_adapters()

    run_in_virtual_time(main())
