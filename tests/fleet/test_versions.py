"""``name@version`` in a fleet: a number never stands for two contents, whatever is lost."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.engine_fixtures import Tiny, greedy
from support.fleet_here import ReplicaHere, small_engine
from support.registry_actor import RegistryActor
from support.small_fleet import Gateway, replica

from aioengine import EngineConfig
from aioengine.errors import AdapterError, AdapterNotFound
from aioengine.executors.process.wire import unpack_error
from aioengine.fleet import registry
from aioengine.fleet.config import FleetConfig
from aioengine.fleet.registry import AdapterRegistry, Entry
from aioengine.fleet.wire import ChannelName, Delta, Submit, decode_frame, encode_orders
from aioengine.request import RequestOptions, Wanted, pack_params

pytest.importorskip("ray.serve", reason="Ray has no wheel for this system or Python")


FIXED = FleetConfig(engine=EngineConfig(model="tiny"), adapters={"fixed": "fixed"})


@pytest.fixture
async def real(tiny_text: Tiny) -> Any:
    """Two replicas with an engine each, without Ray."""
    engine = small_engine(tiny_text)
    made = []
    for _ in range(2):
        replica = ReplicaHere.__new__(ReplicaHere)
        await replica.__init__(FleetConfig(engine=engine))  # type: ignore[misc] # Serve does it so
        made.append(replica)
    yield made
    for replica in made:
        await replica.stop()


async def test_replicas_that_have_counted_differently_agree(
    real: Any, tiny_text: Tiny, adapters: Path
) -> None:
    """The second one comes after the first has had three versions, and was away when the adapter was unloaded
    and loaded again."""
    first, second = real
    one, two = str(adapters / "a"), str(adapters / "b")
    files = Tiny(tiny_text.model, {"a": adapters / "a", "b": adapters / "b"})
    gateway = Gateway(first)
    await gateway.adapters.start_adapters(RegistryActor())

    async def tokens(replica: Any, adapter: str) -> list[int]:
        own = replica._adapters.holding(adapter, await gateway.adapters.content(adapter))
        output = await replica.engine.complete([5, 6, 7], greedy(6), adapter=own)
        found: list[int] = output.token_ids
        return found

    numbers = [(await gateway.load("sql", path, replace=True)).version for path in (one, two, one)]
    assert numbers == [1, 2, 3]
    gateway.replicas["r1"] = second
    await gateway.joins("r1")
    of_one, of_two = files.expected([5, 6, 7], 6, "a"), files.expected([5, 6, 7], 6, "b")
    assert await tokens(first, "sql@3") == await tokens(second, "sql@3") == of_one
    del gateway.members.members["r1"]
    await gateway.adapters.unload_adapter("sql", force=False)
    assert (await gateway.load("sql", two)).version == 4
    await gateway.joins("r1")
    assert await tokens(first, "sql@4") == await tokens(second, "sql@4") == of_two != of_one
    for gone in ("sql@0", "sql@1", "sql@2", "sql@3"):
        with pytest.raises(AdapterNotFound, match="gone: the current one is 4"):
            await gateway.adapters.content(gone)
    assert [info.version for info in gateway.adapters.adapters() if info.name == "sql"] == [4]
    del gateway.members.members["r1"]
    await gateway.adapters.unload_adapter("sql", force=False)
    await gateway.joins("r1")
    with pytest.raises(AdapterNotFound):
        await second.engine.complete([5], greedy(1), adapter="sql")
    await gateway.adapters.stop_adapters()


@pytest.mark.parametrize("named", ["sql@7", {"sql@7": 0.5}])
async def test_an_error_names_what_was_asked_for(real: Any, adapters: Path, named: Wanted) -> None:
    """Not the number that the replica's engine has given to it."""
    replica = real[0]
    await replica.adapter("sync", {"entries": [Entry("sql", str(adapters / "b"), 8)]})
    frames = replica.channel(ChannelName("gateway", 0))
    await anext(frames)
    options = RequestOptions(adapter=named)
    order = Submit(1, "r", [5], pack_params(greedy(1)), options, contents=["0" * 64], content="0" * 64)
    await replica.submit(ChannelName("gateway", 0), encode_orders([order]))
    found: list[Delta] = []
    while not found:
        found = decode_frame(await anext(frames)).deltas
    error = unpack_error(found[0].error)
    assert isinstance(error, AdapterNotFound) and error.name == "sql@7" and "gone" in str(error)
    await frames.aclose()


async def test_an_adapter_that_nobody_has_loaded_has_no_numbers() -> None:
    gateway = Gateway(await replica(FIXED), config=FIXED)
    await gateway.adapters.start_adapters(RegistryActor())
    with pytest.raises(AdapterNotFound, match="nobody has loaded 'sql' through the fleet"):
        await gateway.adapters.content("sql@1")
    assert await gateway.adapters.content("fixed@1") == "", "nobody has read it"


@settings(max_examples=25)
@given(
    changes=st.lists(
        st.tuples(
            st.sampled_from(["load", "replace", "unload", "registry", "away", "new gateway"]),
            st.integers(0, 1),
            st.sampled_from(["a", "b"]),
        ),
        max_size=16,
    ),
    remembered=st.integers(1, 3),
)
@example(
    changes=[
        ("away", 1, "b"),
        ("replace", 0, "a"),
        ("load", 0, "b"),
        ("load", 1, "a"),
        ("new gateway", 1, "a"),
    ],
    remembered=1,
)
@example(
    changes=[("away", 0, "a"), ("new gateway", 1, "a"), ("load", 0, "a"), ("load", 1, "a")],
    remembered=1,
)
@pytest.mark.slow
def test_a_number_never_names_two_contents(changes: list[tuple[str, int, str]], remembered: int) -> None:
    """Two gateways change adapters in turn, the registry's process is lost, and gateways go and others come.
    One of two replicas may be away. However little the registry remembers, gateways that look know what there
    is."""

    async def main() -> None:
        fsspec.filesystem("memory").store.clear()
        actor = RegistryActor(lambda: AdapterRegistry("memory://fleet"))
        ones = [await replica(FIXED) for _ in range(2)]
        gateways = [Gateway(ones[0], None, ones[1], config=FIXED) for _ in range(2)]
        contents = defaultdict[tuple[str, int], set[str]](set)
        for gateway in gateways:
            await gateway.adapters.start_adapters(actor)
        for number, (what, which, name) in enumerate(changes):
            gateway = gateways[which]
            try:
                if what in ("load", "replace"):
                    await gateway.load(name, f"{name}/{number}", replace=what == "replace")
                elif what == "unload":
                    await gateway.adapters.unload_adapter(name, force=False)
            except AdapterError:
                pass
            if what == "registry":
                actor.restart()
            elif what == "new gateway":
                await gateway.adapters.stop_adapters()
                gateways[which] = Gateway(ones[0], None, ones[1], config=FIXED)
                await gateways[which].adapters.start_adapters(actor)
            elif what == "away":
                for each in gateways:
                    gone = each.replicas.keys() - each.members.members.keys()
                    if gone:
                        await each.joins(gone.pop())
                    else:
                        del each.members.members[f"r{which}"]
            for one in ones:
                for name, version in one._adapters._told.items():
                    contents[name, version].add(one.engine.has.get(name, ""))
        there = {entry.name: entry for entry in await actor.entries.remote()}
        for gateway in gateways:
            known = gateway.adapters.known
            await known.refresh(actor)
            assert {name: entry for name, entry in known.by_name.items() if name != "fixed"} == there
            await gateway.adapters.stop_adapters()
        assert all(len(found) == 1 for found in contents.values()), contents

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "MAX_NAMES", remembered)
        patch.setattr(registry, "MAX_CHANGES", remembered)
        asyncio.run(main())
