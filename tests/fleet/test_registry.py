"""The registry, and its checkpoint: denied, broken, slow, and not there; without Ray's actors."""

from __future__ import annotations

import asyncio
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.adapter_infos import adapter_info
from support.registry_actor import RegistryActor
from support.s3_server import check_keys_after, s3, s3_server
from support.waiting import SECONDS, until

from aioengine import EngineConfig
from aioengine.errors import AdapterLoadError, ConfigError
from aioengine.fleet import registry
from aioengine.fleet.config import FleetConfig
from aioengine.fleet.gateway import entries
from aioengine.fleet.gateway.adapters import FleetAdapters
from aioengine.fleet.gateway.entries import KnownEntries
from aioengine.fleet.gateway.members import Member, Members
from aioengine.fleet.registry import AdapterRegistry, Entry
from aioengine.info import AdapterInfo
from aioengine.schedulers.routing import FleetState

__all__ = ["s3", "s3_server"]

pytest.importorskip("ray.exceptions", reason="Ray has no wheel for this system or Python")

FILE = "adapters.json"


async def restored(url: str) -> list[str]:
    """Names of the adapters that a new actor finds."""
    return [entry.name for entry in await AdapterRegistry(url).entries()]


async def test_a_bucket_that_is_denied(s3: Any, s3_server: str) -> None:
    actor = AdapterRegistry("s3://lora/fleet")
    check_keys_after(s3_server, "0")
    try:
        with pytest.raises(
            ConfigError, match=r"registry='s3://lora/fleet': cannot be read: access is denied"
        ):
            await actor.configure(b"one")
    finally:
        check_keys_after(s3_server, "inf")
    assert await actor.configure(b"one") == b"one"
    assert await actor.configure(b"two") == b"one"
    await actor.change("sql", None, Entry("sql", "s3://lora/sql", 1))
    assert await restored("s3://lora/fleet") == ["sql"]


async def test_a_bucket_that_does_not_exist(s3: Any) -> None:
    with pytest.raises(ConfigError, match=r"registry='s3://elsewhere': cannot be written.*bucket"):
        await AdapterRegistry("s3://elsewhere").configure(b"")
    assert [bucket["Name"] for bucket in s3.list_buckets()["Buckets"]] == ["lora"], "none is made by mistake"


@pytest.fixture
def store() -> Any:
    files = fsspec.filesystem("memory")
    files.store.clear()
    return files


async def test_what_cannot_be_read_is_not_written_over(store: Any) -> None:
    store.pipe(f"/fleet/{FILE}", b"{broken")
    actor = AdapterRegistry("memory://fleet")
    for call in (
        actor.configure(b""),
        actor.entries(),
        actor.changes(None),
        actor.change("sql", None, Entry("sql", "sql", 1)),
        actor.change("sql", None, None),
    ):
        with pytest.raises(ConfigError, match="registry='memory://fleet': cannot be read"):
            await call
    assert store.cat(f"/fleet/{FILE}") == b"{broken"
    store.rm(f"/fleet/{FILE}")
    await actor.change("sql", None, Entry("sql", "sql", 1))
    assert await restored("memory://fleet") == ["sql"]


class Gateway:
    """A gateway to one replica, which can do whatever it is asked to."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        config = FleetConfig(engine=EngineConfig(model="tiny"), adapters={"fixed": "fixed"})
        handle = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._answer))
        self.members = Members(config, handle, gateway="gateway")
        self.members.members["r0"] = Member(SimpleNamespace(replica="r0"), None)  # type: ignore[arg-type]
        self.adapters = FleetAdapters(config, self.members)

    async def _answer(self, action: str, arguments: dict[str, Any], to: str) -> AdapterInfo | None:
        self.asked.append((action, arguments))
        return adapter_info(arguments["name"]) if action in ("load", "unload", "prepare", "pin") else None

    async def load(self, name: str, **flags: Any) -> None:
        await self.adapters.load_adapter(name, name, **{"pin": False, "replace": False, **flags})

    @property
    def names(self) -> list[str]:
        assert {*self.members.state.snapshot().adapters} == {info.name for info in self.adapters.adapters()}
        return sorted(info.name for info in self.adapters.adapters())

    async def joins(self) -> list[Entry]:
        """A replica joins; returns what it is told of."""
        self.asked.clear()
        for listener in self.members.on_join:
            listener(member := Member(SimpleNamespace(replica="r1"), None))  # type: ignore[arg-type]
        await until(lambda: member.ready)
        return [entry for action, given in self.asked if action == "sync" for entry in given["entries"]]


@pytest.fixture
def actor() -> RegistryActor:
    return RegistryActor(lambda: AdapterRegistry("memory://fleet"))


async def test_a_change_that_cannot_be_saved(
    store: Any, actor: RegistryActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused before any replica has made it."""
    gateway = Gateway()
    await gateway.adapters.start_adapters(actor)

    def denied(*arguments: Any, **options: Any) -> None:
        raise PermissionError("not yours")

    with monkeypatch.context() as patch:
        patch.setattr(type(store), "pipe_file", denied)
        with pytest.raises(AdapterLoadError, match=r"nothing is changed.*access is denied") as told:
            await gateway.load("a")
        assert told.value.transient
        assert "traceback" not in str(told.value)
        assert gateway.names == ["fixed"]
    assert await restored("memory://fleet") == []
    await gateway.load("a")
    await gateway.load("b")
    assert await restored("memory://fleet") == ["a", "b"]
    with monkeypatch.context() as patch:
        patch.setattr(type(store), "pipe_file", denied)
        gateway.asked.clear()
        for change in (gateway.adapters.unload_adapter, gateway.adapters.pin_adapter):
            with pytest.raises(AdapterLoadError, match="nothing is changed"):
                await change("a")
        assert [action for action, _ in gateway.asked] == ["sync", "pin", "unpin", "sync"]
    assert gateway.names == ["a", "b", "fixed"]
    await gateway.adapters.unload_adapter("a")
    assert await restored("memory://fleet") == ["b"]
    await gateway.adapters.stop_adapters()


async def test_a_gateway_hears_of_what_others_have_changed_and_of_nothing_else(
    store: Any, actor: RegistryActor
) -> None:
    one, other = Gateway(), Gateway()
    await one.adapters.start_adapters(actor)
    await other.adapters.start_adapters(actor)
    for name in "abc":
        await one.load(name)
    await one.adapters.unload_adapter("b", force=False)
    assert other.names == ["fixed"]
    assert [entry.name for entry in await other.joins()] == ["c", "a"]
    assert other.names == one.names == ["a", "c", "fixed"]
    await one.load("a", replace=True)
    actor.answers.clear()
    assert {(entry.name, entry.version) for entry in await other.joins()} == {("a", 2), ("c", 1)}
    (changes,) = actor.answers
    assert [entry.name for entry in changes.entries] == ["a"], "not what it knows already"
    await one.adapters.unload_adapter("c", force=False)
    actor.restart()
    assert [entry.name for entry in await other.joins()] == ["a"], "all of it, from the checkpoint"
    assert other.names == ["a", "fixed"]


@given(
    changes=st.lists(st.tuples(st.sampled_from(["put", "remove", "look", "restart"]), st.integers(0, 5))),
    kept=st.integers(1, 4),
)
@pytest.mark.slow
def test_a_gateway_that_looks_knows_what_there_is(changes: list[tuple[str, int]], kept: int) -> None:
    """Whatever was changed since it looked last, and however little of that is remembered."""

    async def main() -> None:
        files = fsspec.filesystem("memory")
        files.store.clear()
        actor = RegistryActor(lambda: AdapterRegistry("memory://fleet"))
        known = KnownEntries({}, FleetState(lambda: 0.0))
        there: dict[str, Entry] = {}
        for number, (what, index) in enumerate([*changes, ("look", 0)]):
            name = f"adapter-{index}"
            if what == "put":
                before, there[name] = there.get(name), Entry(name, name, number + 1)
                assert await actor.change.remote(name, before, there[name]) == (True, there[name])
            elif what == "remove":
                assert await actor.change.remote(name, there.pop(name, None), None) == (True, None)
            elif what == "restart":
                actor.restart()
            else:
                await known.refresh(actor)
                assert known.by_name == there

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "MAX_CHANGES", kept)
        asyncio.run(main())


async def test_a_registry_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is missed where the registry runs, and nowhere else."""
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    url = FleetConfig(engine=EngineConfig(model="tiny"), registry="gs://fleet").registry
    with pytest.raises(
        ConfigError, match=r"registry='gs://fleet': needs pip install 'aioengine\[gcs\]'.*Ray's head"
    ):
        await AdapterRegistry(url).configure(b"")


async def test_a_change_of_what_is_not_there_any_more() -> None:
    """It is refused, unless Ray has repeated a call. No version comes again."""
    actor, one, other = AdapterRegistry(None), Entry("sql", "sql", 1), Entry("sql", "sql", 2)
    assert await actor.change("sql", None, one) == await actor.change("sql", None, one) == (True, one)
    assert await actor.change("sql", None, other) == await actor.change("sql", other, None) == (False, one)
    assert await actor.entries() == [one]
    assert await actor.change("sql", one, other) == (True, other)
    assert await actor.change("sql", other, None) == (True, None) and not await actor.entries()
    assert await actor.change("sql", None, one) == (True, msgspec.structs.replace(one, version=3))


async def test_a_registry_in_a_folder(tmp_path: Path) -> None:
    await AdapterRegistry(str(tmp_path / "kept")).change("sql", None, Entry("sql", "sql", 1))
    assert await restored(str(tmp_path / "kept")) == ["sql"]


# A checkpoint that hangs


class Hanging:
    """A store whose writes do not end until ``released`` is set."""

    def __init__(self, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = threading.Event()
        self.released = threading.Event()
        real = type(store).pipe_file

        def slow(*arguments: Any, **options: Any) -> Any:
            self.begun.set()
            assert self.released.wait(SECONDS)
            return real(*arguments, **options)

        monkeypatch.setattr(type(store), "pipe_file", slow)


async def test_who_reads_does_not_wait_for_a_write(
    store: Any, actor: RegistryActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = Gateway()
    await gateway.adapters.start_adapters(actor)
    hanging = Hanging(store, monkeypatch)
    writing = asyncio.ensure_future(actor.change.remote("a", None, Entry("a", "a", 1)))
    try:
        await until(hanging.begun.is_set)
        assert not await gateway.joins() and not writing.done()
    finally:
        hanging.released.set()
        await writing
    assert await restored("memory://fleet") == ["a"]


async def test_a_replica_gets_what_the_gateway_knows_if_the_registry_is_silent(
    actor: RegistryActor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Silent:
        def __getattr__(self, name: str) -> Any:
            return SimpleNamespace(remote=lambda *_: asyncio.Event().wait())

    gateway = Gateway()
    await gateway.adapters.start_adapters(actor)
    await gateway.load("a")
    monkeypatch.setattr(entries, "REFRESH_SECONDS", 0.01)
    gateway.adapters.registry = Silent()
    assert [entry.name for entry in await gateway.joins()] == ["a"]
    assert "no answer within 0.01 s" in caplog.text
