"""``name@version`` in a fleet: a number never stands for two contents, whatever is lost."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.adapter_infos import adapter_info
from support.engine_fixtures import Tiny, greedy
from support.fleet_here import ReplicaHere, small_engine
from support.registry_actor import RegistryActor

from aioengine import EngineConfig
from aioengine.errors import AdapterError, AdapterNotFound
from aioengine.fleet import versions
from aioengine.fleet.config import FleetConfig
from aioengine.fleet.gateway.adapters import FleetAdapters
from aioengine.fleet.gateway.members import Member, Members
from aioengine.fleet.registry import AdapterRegistry, Entry
from aioengine.fleet.versions import SpentVersions
from aioengine.fleet.wire import (
    ChannelName,
    Delta,
    Submit,
    decode_frame,
    encode_orders,
    unpack_error,
)
from aioengine.info import AdapterInfo
from aioengine.request import RequestOptions, Wanted, pack_params

pytest.importorskip("ray.serve", reason="Ray has no wheel for this system or Python")


class Gateway:
    """A gateway to the given replicas, in this process; ``replicas``: what each does with an adapter."""

    def __init__(self, **replicas: Any) -> None:
        self.replicas = replicas
        handle = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._call))
        config = FleetConfig(engine=EngineConfig(model="tiny"), adapters={"fixed": "fixed"})
        self.members = Members(config, handle, gateway=f"gateway-{id(self)}")
        self.adapters = FleetAdapters(config, self.members)
        for name in replicas:
            self.members.members[name] = Member(SimpleNamespace(replica=name), None)  # type: ignore[arg-type]

    async def _call(self, action: str, arguments: dict[str, Any], to: str) -> Any:
        return await self.replicas[to].adapter(action, dict(arguments))

    async def joins(self, name: str) -> None:
        """A replica is back, or new."""
        for listener in self.members.on_join:
            listener(self.members.members[name])
        while not self.members.members[name].ready:
            await asyncio.sleep(0)

    async def load(self, name: str, path: str, *, replace: bool) -> AdapterInfo:
        return await self.adapters.load_adapter(name, path, pin=False, replace=replace)


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
    gateway = Gateway(first=first)
    await gateway.adapters.start_adapters(RegistryActor())

    async def tokens(replica: Any, adapter: str) -> list[int]:
        own = replica._adapters.holding(adapter, await gateway.adapters.content(adapter))
        output = await replica.engine.complete([5, 6, 7], greedy(6), adapter=own)
        found: list[int] = output.token_ids
        return found

    numbers = [(await gateway.load("sql", path, replace=True)).version for path in (one, two, one)]
    assert numbers == [1, 2, 3]
    gateway.replicas["second"] = second
    gateway.members.members["second"] = Member(SimpleNamespace(replica="second"), None)  # type: ignore[arg-type]
    await gateway.joins("second")
    of_one, of_two = files.expected([5, 6, 7], 6, "a"), files.expected([5, 6, 7], 6, "b")
    assert await tokens(first, "sql@3") == await tokens(second, "sql@3") == of_one
    away = gateway.members.members.pop("second")
    await gateway.adapters.unload_adapter("sql", force=False)
    assert (await gateway.load("sql", two, replace=False)).version == 4
    gateway.members.members["second"] = away
    await gateway.joins("second")
    assert await tokens(first, "sql@4") == await tokens(second, "sql@4") == of_two != of_one
    for gone in ("sql@0", "sql@1", "sql@2", "sql@3"):
        with pytest.raises(AdapterNotFound, match="gone: the current one is 4"):
            await gateway.adapters.content(gone)
    assert [info.version for info in gateway.adapters.adapters() if info.name == "sql"] == [4]
    gateway.members.members.pop("second")
    await gateway.adapters.unload_adapter("sql", force=False)
    gateway.members.members["second"] = away
    await gateway.joins("second")
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
    gateway = Gateway(r0=Replica())
    await gateway.adapters.start_adapters(RegistryActor())
    with pytest.raises(AdapterNotFound, match="nobody has loaded 'sql' through the fleet"):
        await gateway.adapters.content("sql@1")
    assert await gateway.adapters.content("fixed@1") == "", "nobody has read it"


class Replica:
    """Takes whatever it is told to, and remembers which content each number of a name has had."""

    def __init__(self) -> None:
        self.told = {"fixed": 1}
        self.named: set[tuple[str, int, str]] = set()
        self._paths: dict[str, str] = {}
        """What it has or has prepared, by name."""
        self._count = 0

    async def adapter(self, action: str, arguments: dict[str, Any]) -> Any:
        name = arguments.get("name", "")
        if action == "prepare":
            self._paths[name] = arguments["path"]
        elif action in ("unload", "forget"):
            self.told.pop(name, None)
            self._paths.pop(name, None)
        elif action == "sync":
            for entry in arguments["entries"]:
                if self.told.get(entry.name, 0) < entry.version:
                    self._takes(entry.name, entry.version, entry.path)
            others = self.told.keys() - {"fixed", *(entry.name for entry in arguments["entries"])}
            return {other: self.told[other] for other in others if arguments.get("whole")}
        return self._info(name, self._paths.get(name) or arguments.get("path") or "")

    def _takes(self, name: str, version: int, path: str) -> None:
        self._count += 1
        self._paths[name] = path
        self.told[name] = version
        self.named.add((name, version, path))

    def _info(self, name: str, path: str) -> AdapterInfo:
        return adapter_info(name, version=self._count, path=path, digest=path, location="disk")


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
    One of two replicas may be away."""

    async def main() -> None:
        fsspec.filesystem("memory").store.clear()
        actor = RegistryActor(lambda: AdapterRegistry("memory://fleet"))
        made = {"r0": Replica(), "r1": Replica()}
        gateways = [Gateway(**made), Gateway(**made)]
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
                gateways[which] = Gateway(**made)
                await gateways[which].adapters.start_adapters(actor)
            elif what == "away":
                for each in gateways:
                    members = each.members.members
                    gone = {"r0", "r1"} - members.keys()
                    if gone:
                        members |= {r: Member(SimpleNamespace(replica=r), None) for r in gone}  # type: ignore[arg-type]
                        await each.joins(gone.pop())
                    else:
                        del members[f"r{which}"]
        for gateway in gateways:
            await gateway.adapters.stop_adapters()
        contents: dict[tuple[str, int], set[str]] = {}
        for replica in made.values():
            for name, version, path in replica.named:
                contents.setdefault((name, version), set()).add(path)
        assert all(len(paths) == 1 for paths in contents.values()), contents

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(versions, "MAX_NAMES", remembered)
        asyncio.run(main())


@given(
    spent=st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 9))),
    remembered=st.integers(1, 4),
)
def test_what_is_forgotten_counts_as_spent(spent: list[tuple[str, int]], remembered: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(versions, "MAX_NAMES", remembered)
        known = SpentVersions()
        for name, number in spent:
            known.spend(name, number)
        assert len(known.last) <= remembered
        assert all(known.of(name) >= number for name, number in spent)
