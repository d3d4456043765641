"""The registry's checkpoint: denied, broken, and not there; without Ray's actors."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
from support.s3_server import check_keys_after, s3, s3_server

from aioengine import EngineConfig
from aioengine.errors import AdapterLoadError, ConfigError
from aioengine.fleet.config import FleetConfig
from aioengine.fleet.door import adapters as door_adapters
from aioengine.fleet.door.adapters import FleetAdapters
from aioengine.fleet.door.members import Member, Members
from aioengine.fleet.registry import AdapterRegistry, Entry
from aioengine.info import AdapterInfo

__all__ = ["s3", "s3_server"]

ray_errors = pytest.importorskip("ray.exceptions", reason="Ray has no wheel for this system or Python")

FILE = "adapters.json"


async def restored(url: str) -> list[str]:
    """Names of the adapters that a new actor finds."""
    return [entry.name for entry in await AdapterRegistry(url).entries()]


async def test_a_bucket_that_is_denied(s3: Any, s3_server: str) -> None:
    registry = AdapterRegistry("s3://lora/fleet")
    check_keys_after(s3_server, "0")
    try:
        with pytest.raises(
            ConfigError, match=r"registry='s3://lora/fleet': cannot be read: access is denied"
        ):
            await registry.configure(b"one")
    finally:
        check_keys_after(s3_server, "inf")
    assert await registry.configure(b"one") == b"one"
    assert await registry.configure(b"two") == b"one"
    await registry.put(Entry("sql", "s3://lora/sql", 1))
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
    registry = AdapterRegistry("memory://fleet")
    for call in (
        registry.configure(b""),
        registry.entries(),
        registry.put(Entry("sql", "sql", 1)),
        registry.remove("sql"),
    ):
        with pytest.raises(ConfigError, match="registry='memory://fleet': cannot be read"):
            await call
    assert store.cat(f"/fleet/{FILE}") == b"{broken"
    store.rm(f"/fleet/{FILE}")
    await registry.put(Entry("sql", "sql", 1))
    assert await restored("memory://fleet") == ["sql"]


class Actor:
    """A registry as Ray's handle of it: what it raises comes as Ray's error."""

    def __init__(self, registry: AdapterRegistry) -> None:
        self._registry = registry

    def __getattr__(self, name: str) -> Any:
        async def remote(*arguments: Any) -> Any:
            try:
                return await getattr(self._registry, name)(*arguments)
            except Exception as error:
                raise ray_errors.RayTaskError(
                    name, "a traceback of many lines", error
                ).as_instanceof_cause() from None

        return SimpleNamespace(remote=remote)


async def test_a_change_that_cannot_be_saved(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for it is told; the replicas have it, and the next change saves both."""
    registry = AdapterRegistry("memory://fleet")
    monkeypatch.setattr(door_adapters, "registry_actor", lambda *_: Actor(registry))

    async def remote(action: str, arguments: dict[str, Any], to: str) -> AdapterInfo | None:
        return info(arguments["name"]) if action in ("load", "unload") else None

    handle = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=remote))
    config = FleetConfig(engine=EngineConfig(model="tiny"), registry="memory://fleet")
    members = Members(config, handle, door="door")
    members.members["r0"] = Member(SimpleNamespace(replica="r0"), None)  # type: ignore[arg-type]
    adapters = FleetAdapters(config, members)
    await adapters.start()

    def denied(*arguments: Any, **options: Any) -> None:
        raise PermissionError("not yours")

    async def load(name: str) -> None:
        await adapters.load(name, name, pin=False, force_pin=False, replace=False)

    with monkeypatch.context() as patch:
        patch.setattr(type(store), "pipe_file", denied)
        with pytest.raises(
            AdapterLoadError, match=r"have made the change.*repeat it.*access is denied"
        ) as told:
            await load("a")
        assert told.value.transient
        assert "traceback" not in str(told.value)
        assert [info.name for info in adapters.all()] == ["a"]
    assert await restored("memory://fleet") == []
    await load("b")
    assert await restored("memory://fleet") == ["a", "b"]
    with monkeypatch.context() as patch:
        patch.setattr(type(store), "pipe_file", denied)
        with pytest.raises(AdapterLoadError, match="have made the change"):
            await adapters.unload("a", force=False)
    await adapters.unload("b", force=False)
    assert await restored("memory://fleet") == []
    await adapters.stop()


def info(name: str) -> AdapterInfo:
    return AdapterInfo(
        name=name,
        version=1,
        path=name,
        rank=8,
        bytes=1,
        location="cpu",
        slot=None,
        pinned=False,
        running=0,
        waiting=0,
    )


def test_a_registry_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ConfigError, match=r"gs://fleet.*pip install 'aioengine\[gcs\]'"):
        FleetConfig(engine=EngineConfig(model="tiny"), registry="gs://fleet")
