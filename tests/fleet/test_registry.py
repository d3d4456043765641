"""The registry, and its checkpoint: denied, broken, slow, and not there; without Ray's actors."""

from __future__ import annotations

import asyncio
import sys
import threading
from pathlib import Path
from typing import Any

import fsspec
import msgspec
import pytest
from support.registry_actor import FarRegistry, RegistryActor
from support.s3_server import check_keys_after, s3, s3_server
from support.small_fleet import Gateway, replica
from support.waiting import SECONDS, until

from aioengine import EngineConfig
from aioengine.errors import AdapterLoadError, ConfigError
from aioengine.fleet.config import FleetConfig
from aioengine.fleet.gateway import entries
from aioengine.fleet.registry import AdapterRegistry, Entry

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


CONFIG = FleetConfig(engine=EngineConfig(model="tiny"), adapters={"fixed": "fixed"})


async def gateway_to_one(actor: RegistryActor) -> Gateway:
    """A gateway to one replica."""
    gateway = Gateway(await replica(CONFIG), config=CONFIG)
    await gateway.adapters.start_adapters(actor)
    return gateway


def names(gateway: Gateway) -> list[str]:
    """Of the adapters that it knows."""
    found = sorted(info.name for info in gateway.adapters.adapters())
    assert sorted(gateway.members.state.snapshot().adapters) == found
    return found


async def told(gateway: Gateway) -> list[Entry]:
    """What a replica is told of that joins."""
    gateway.asked.clear()
    await gateway.joins()
    return [entry for action, given in gateway.asked if action == "sync" for entry in given["entries"]]


@pytest.fixture
def actor() -> RegistryActor:
    return RegistryActor(lambda: AdapterRegistry("memory://fleet"))


async def test_a_change_that_cannot_be_saved(
    store: Any, actor: RegistryActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused before any replica has made it."""
    gateway = await gateway_to_one(actor)

    def denied(*arguments: Any, **options: Any) -> None:
        raise PermissionError("not yours")

    with monkeypatch.context() as patch:
        patch.setattr(type(store), "pipe_file", denied)
        with pytest.raises(AdapterLoadError, match=r"nothing is changed.*access is denied") as caught:
            await gateway.load("a")
        assert caught.value.transient
        assert "traceback" not in str(caught.value)
        assert names(gateway) == ["fixed"]
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
        assert [action for action, _ in gateway.asked] == ["settle", "pin", "settle"]
    assert names(gateway) == ["a", "b", "fixed"]
    await gateway.adapters.unload_adapter("a")
    assert await restored("memory://fleet") == ["b"]
    await gateway.adapters.stop_adapters()


async def test_a_gateway_hears_of_what_others_have_changed_and_of_nothing_else(
    store: Any, actor: RegistryActor
) -> None:
    one, other = await gateway_to_one(actor), await gateway_to_one(actor)
    for name in "abc":
        await one.load(name)
    await one.adapters.unload_adapter("b", force=False)
    assert names(other) == ["fixed"]
    assert [entry.name for entry in await told(other)] == ["c", "a"]
    assert names(other) == names(one) == ["a", "c", "fixed"]
    await one.load("a", replace=True)
    actor.answers.clear()
    assert {(entry.name, entry.version) for entry in await told(other)} == {("a", 2), ("c", 1)}
    (changes,) = actor.answers
    assert [entry.name for entry in changes.entries] == ["a"], "not what it knows already"
    await one.adapters.unload_adapter("c", force=False)
    actor.restart()
    assert [entry.name for entry in await told(other)] == ["a"], "all of it, from the checkpoint"
    assert names(other) == ["a", "fixed"]


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
    gateway = await gateway_to_one(actor)
    hanging = Hanging(store, monkeypatch)
    writing = asyncio.ensure_future(actor.change.remote("a", None, Entry("a", "a", 1)))
    try:
        await until(hanging.begun.is_set)
        assert not await told(gateway) and not writing.done()
    finally:
        hanging.released.set()
        await writing
    assert await restored("memory://fleet") == ["a"]


async def test_a_replica_gets_what_the_gateway_knows_if_the_registry_is_silent(
    actor: RegistryActor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gateway = await gateway_to_one(actor)
    await gateway.load("a")
    monkeypatch.setattr(entries, "REFRESH_SECONDS", 0.01)
    gateway.adapters.registry = FarRegistry(actor, any=60.0)
    assert [entry.name for entry in await told(gateway)] == ["a"]
    assert "no answer within 0.01 s" in caplog.text
