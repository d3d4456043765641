"""The same adapter with different content on two replicas: found and mended, without Ray."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from support.adapter_infos import adapter_info
from support.registry_actor import RegistryActor

from aioengine import EngineConfig
from aioengine.errors import AdapterInvalid, AdapterNotFound
from aioengine.fleet.config import FleetConfig
from aioengine.fleet.gateway.adapters import FleetAdapters
from aioengine.fleet.gateway.members import Member, Members
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
        return "".join(info.digest for info in self.member.residency.adapters)

    def read(self) -> AdapterInfo:
        if not self.disk:
            raise AdapterNotFound("it is gone", name="sql")
        self.versions += 1
        return adapter_info("sql", version=self.versions, digest=self.disk)

    def hold(self, info: AdapterInfo) -> None:
        before, self.member.residency = self.member.residency, Residency([], [info])
        for listener in self._members.on_residency:
            listener(self.member, before)

    async def adapter(self, action: str, arguments: dict[str, Any]) -> Any:
        try:
            if action == "prepare":
                self.prepared = self.read()
                return self.prepared
            if action == "load":
                self.hold(info := self.read())
                return info
        except AdapterNotFound as error:
            return error
        if action == "sync" and self.prepared is not None:
            assert [entry.digest for entry in arguments["entries"]] == [self.prepared.digest]
            self.hold(self.prepared)
        if action in ("sync", "discard"):
            self.prepared = None
        return None


Change = Callable[[FleetAdapters, Members], Awaitable[None]]


async def _nothing(adapters: FleetAdapters, members: Members) -> None:
    pass


def contents(*disks: str, held: tuple[str, ...], change: Change = _nothing) -> tuple[list[str], int]:
    """What replicas hold in the end that held other content at first ("": nothing), and the conflicts that
    were counted. ``change`` is done when the disks have what they have."""

    async def main() -> tuple[list[str], int]:
        replicas: dict[str, Replica] = {}

        async def remote(action: str, arguments: dict[str, Any], to: str) -> Any:
            return await replicas[to].adapter(action, arguments)

        handle = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=remote))
        members = Members(
            FleetConfig(engine=EngineConfig(model="tiny"), replicas=2), handle, gateway="gateway"
        )
        adapters = FleetAdapters(members.config, members)
        await adapters.start_adapters(RegistryActor())
        for index, (disk, before) in enumerate(zip(disks, held, strict=True)):
            replica = replicas[f"r{index}"] = Replica(f"r{index}", members, before)
            if before:
                replica.hold(replica.read())
            replica.disk = disk
        await change(adapters, members)
        await asyncio.sleep(5)
        assert all(replica.prepared is None for replica in replicas.values())
        await adapters.stop_adapters()
        return [replica.content for replica in replicas.values()], members.conflicts

    return run_in_virtual_time(main())


def test_all_take_what_is_there_now() -> None:
    found = contents("new", "new", "new", held=("old", "new", "old"))
    assert found == (["new"] * 3, 1)


def test_equal_content_is_left_alone() -> None:
    assert contents("new", "new", held=("old", "old")) == (["old", "old"], 0)


@pytest.mark.parametrize(
    ("disks", "why"), [(("x", "y"), "not the same on all nodes"), (("x", ""), "is gone")]
)
def test_all_or_none(disks: tuple[str, str], why: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "aioengine.fleet"):
        found = contents(*disks, held=("old", "other"))
    assert found == (["old", "other"], 1), "it is not tried for ever"
    assert why in caplog.text


async def _replaced(adapters: FleetAdapters, members: Members) -> None:
    await adapters.load_adapter("sql", "sql", pin=False, replace=True)


async def _replaced_in_vain(adapters: FleetAdapters, members: Members) -> None:
    with pytest.raises(AdapterInvalid, match=r"not the same on all nodes \(SHA-256 x... on r0, y... on r1\)"):
        await _replaced(adapters, members)


def test_no_replica_takes_a_version_that_is_not_the_same_everywhere() -> None:
    found = contents("x", "y", held=("old", "old"), change=_replaced_in_vain)
    assert found == (["old", "old"], 0), "it was found before, not after"
    found = contents("x", "x", held=("old", "old"), change=_replaced)
    assert found == (["x", "x"], 0)


def test_a_first_load_has_those_agree_that_have_it_already() -> None:
    """They found it by its name, before anybody loaded it."""

    async def loaded(adapters: FleetAdapters, members: Members) -> None:
        info = await adapters.load_adapter("sql", "sql", pin=False, replace=False)
        assert info.digest == "new"

    found, _ = contents("new", "new", held=("new", "old"), change=loaded)
    assert found == ["new", "new"]


def test_what_a_replica_refuses_is_taken_by_all() -> None:
    """One that held nothing has read other content than the others have."""

    async def refused(adapters: FleetAdapters, members: Members) -> None:
        for _ in range(3):
            members.on_changed("r1", "sql")

    assert contents("new", "new", held=("old", ""), change=refused) == (
        ["new", "new"],
        1,
    )
    assert contents("x", "y", held=("old", ""), change=refused) == (["old", ""], 1)
