"""What gateways, the registry and replicas do while an adapter is being changed; without Ray's processes."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fleet_process import needs_ray
from support.registry_actor import FarRegistry, RegistryActor
from support.small_fleet import Gateway, replica

from aioengine.errors import AdapterError, AdapterNotFound
from aioengine.fleet.gateway import entries
from aioengine.lab.simulation.clock import run_in_virtual_time

needs_ray()


@settings(max_examples=40)
@given(
    works=st.lists(
        st.lists(
            st.tuples(
                st.sampled_from(["load", "replace", "unload", "joins"]),
                st.sampled_from("ab"),
                st.integers(0, 3),
            ),
            max_size=5,
        ),
        min_size=2,
        max_size=2,
    ),
    delays=st.lists(st.integers(0, 9), min_size=1),
    registry_seconds=st.sampled_from([0.0, 3.0]),
)
@pytest.mark.slow
def test_whatever_gateways_do_at_once_a_replica_has_what_the_registry_has(
    works: list[list[tuple[str, str, int]]], delays: list[int], registry_seconds: float
) -> None:
    """Calls take times of their own to reach the replica, and the registry takes its time to answer."""

    async def main() -> None:
        actor, one = RegistryActor(), await replica()
        calls = 0

        async def before(action: str) -> None:
            nonlocal calls
            calls += 1
            await asyncio.sleep(delays[calls % len(delays)])

        async def does(gateway: Gateway, work: list[tuple[str, str, int]]) -> None:
            for what, name, pause in work:
                await asyncio.sleep(pause)
                try:
                    if what == "joins":
                        await gateway.joins()
                    elif what == "unload":
                        await gateway.adapters.unload_adapter(name, force=False)
                    else:
                        await gateway.load(name, replace=what == "replace")
                except AdapterError:
                    pass

        gateways = [Gateway(one, before), Gateway(one, before)]
        for gateway in gateways:
            await gateway.adapters.start_adapters(FarRegistry(actor, any=registry_seconds))
        await asyncio.gather(*map(does, gateways, works))
        found = {entry.name: entry.version for entry in await actor.entries.remote()}
        assert one.engine.has.keys() == found.keys()
        assert one._adapters._told == found
        for gateway in gateways:
            await gateway.adapters.stop_adapters()

    run_in_virtual_time(main())


@pytest.mark.parametrize("seconds", [0.0, 0.3, 60.0], ids=["at once", "slow", "silent"])
@pytest.mark.slow
def test_however_many_ask_for_wrong_versions_the_registry_is_asked_once_a_second(seconds: float) -> None:
    """Some of them go away before they are answered."""

    async def main() -> None:
        one = await replica()
        gateway = Gateway(one)
        await gateway.adapters.start_adapters(registry := FarRegistry(RegistryActor()))
        await gateway.load("sql")
        registry.seconds["any"] = seconds
        registry.asked.clear()
        loop = asyncio.get_running_loop()
        asks: list[asyncio.Task[None]] = []
        begin = loop.time()
        for number in range(1000):
            name = "sql@7" if number % 2 else "x@1"
            asks.append(loop.create_task(gateway.adapters.content(name)))
            if number % 10 == 9:
                asks[number - 5].cancel()
            await asyncio.sleep(0.01)
            await gateway.adapters.content("sql@1")  # whose version is right is not delayed
        assert loop.time() == pytest.approx(begin + 10.0)
        ended = await asyncio.gather(*asks, return_exceptions=True)
        assert {type(end) for end in ended} == {AdapterNotFound, asyncio.CancelledError}
        assert sum(isinstance(end, AdapterNotFound) for end in ended) == 900
        gaps = [later - earlier for earlier, later in zip(registry.asked, registry.asked[1:], strict=False)]
        assert min(gaps) > entries.LOOK_SECONDS - 1e-6
        assert loop.time() - begin < 10.0 + 2 * entries.REFRESH_SECONDS + 2 * entries.LOOK_SECONDS
        await gateway.adapters.stop_adapters()

    run_in_virtual_time(main())


def test_a_version_that_another_gateway_has_just_loaded_is_found_while_others_ask_for_wrong_ones() -> None:
    async def main() -> None:
        actor, one = RegistryActor(), await replica()
        gateway, other = Gateway(one), Gateway(one)
        await gateway.adapters.start_adapters(FarRegistry(actor, any=0.2))
        await other.adapters.start_adapters(actor)
        loop = asyncio.get_running_loop()
        asks: list[asyncio.Task[str]] = []

        async def flood() -> None:
            while True:
                asks.append(loop.create_task(gateway.adapters.content("x@1")))
                await asyncio.sleep(0.01)

        flooding = loop.create_task(flood())
        for pause in range(40):
            await asyncio.sleep(0.07 * pause)
            info = await other.load("sql", replace=True)
            begin = loop.time()
            await gateway.adapters.content(f"sql@{info.version}")
            assert loop.time() - begin <= 0.2 + entries.LOOK_SECONDS + 0.2 + 1e-6
        flooding.cancel()
        assert {type(end) for end in await asyncio.gather(*asks, return_exceptions=True)} == {AdapterNotFound}
        for each in (gateway, other):
            await each.adapters.stop_adapters()

    run_in_virtual_time(main())
