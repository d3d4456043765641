"""The same adapter with different content on two replicas: found and mended, without Ray."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from aioengine import EngineConfig
from aioengine.errors import AdapterNotFound
from aioengine.fleet.config import FleetConfig
from aioengine.fleet.door import adapters as door_adapters
from aioengine.fleet.door.adapters import FleetAdapters
from aioengine.fleet.door.members import Member, Members
from aioengine.fleet.wire import Residency
from aioengine.info import AdapterInfo
from aioengine.lab.simulation.clock import run_in_virtual_time


class Replica:
    """Reads what is on its disk when it is told to. "": the files are gone."""

    def __init__(self, name: str, members: Members, disk: str) -> None:
        self.disk = disk
        self.prepared: AdapterInfo | None = None
        self.member = Member(SimpleNamespace(replica=name), None)  # type: ignore[arg-type]
        self._members = members
        members.members[name] = self.member
        self.versions = 0

    @property
    def content(self) -> str:
        return self.member.residency.adapters[-1].digest

    def read(self) -> AdapterInfo:
        if not self.disk:
            raise AdapterNotFound("it is gone", name="sql")
        self.versions += 1
        return AdapterInfo(
            name="sql",
            version=self.versions,
            path="sql",
            rank=8,
            bytes=1,
            digest=self.disk,
            location="cpu",
            slot=None,
            pinned=False,
            running=0,
            waiting=0,
        )

    def hold(self, info: AdapterInfo) -> None:
        self.member.residency = Residency([], [info])
        for listener in self._members.on_residency:
            listener(self.member)

    async def adapter(self, action: str, arguments: dict[str, Any]) -> Any:
        try:
            if action == "prepare":
                self.prepared = self.read()
                return self.prepared
        except AdapterNotFound as error:
            return error
        if action == "commit" and self.prepared is not None:
            self.hold(self.prepared)
        self.prepared = None
        return None


class Actor:
    """A registry that knows nothing, and holds up nobody."""

    def __getattr__(self, name: str) -> Any:
        async def remote(*arguments: Any) -> list[Any]:
            return []

        return SimpleNamespace(remote=remote)


def contents(*disks: str, held: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], int]:
    """What replicas hold in the end that held other content at first, and the conflicts that were counted."""
    monkeypatch.setattr(door_adapters, "registry_actor", lambda *_: Actor())

    async def main() -> tuple[list[str], int]:
        replicas: dict[str, Replica] = {}

        async def remote(action: str, arguments: dict[str, Any], to: str) -> Any:
            return await replicas[to].adapter(action, arguments)

        handle = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=remote))
        members = Members(FleetConfig(engine=EngineConfig(model="tiny"), replicas=2), handle, door="door")
        adapters = FleetAdapters(members.config, members)
        await adapters.start()
        for index, (disk, before) in enumerate(zip(disks, held, strict=True)):
            replica = replicas[f"r{index}"] = Replica(f"r{index}", members, before)
            replica.hold(replica.read())
            replica.disk = disk
        await asyncio.sleep(5)
        assert all(replica.prepared is None for replica in replicas.values())
        await adapters.stop()
        return [replica.content for replica in replicas.values()], members.conflicts.count

    return run_in_virtual_time(main())


def test_all_take_what_is_there_now(monkeypatch: pytest.MonkeyPatch) -> None:
    found = contents("new", "new", "new", held=("old", "new", "old"), monkeypatch=monkeypatch)
    assert found == (["new"] * 3, 1)


def test_equal_content_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert contents("new", "new", held=("old", "old"), monkeypatch=monkeypatch) == (["old", "old"], 0)


@pytest.mark.parametrize(
    ("disks", "why"), [(("x", "y"), "not the same on all nodes"), (("x", ""), "is gone")]
)
def test_all_or_none(
    disks: tuple[str, str], why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "aioengine.fleet"):
        found = contents(*disks, held=("old", "other"), monkeypatch=monkeypatch)
    assert found == (["old", "other"], 1), "it is not tried for ever"
    assert why in caplog.text
