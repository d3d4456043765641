"""The same adapter with different content on two replicas: found and mended, without Ray."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import pytest
from support.registry_actor import RegistryActor
from support.small_fleet import Gateway, replica

from aioengine.errors import AdapterInvalid
from aioengine.lab.simulation.clock import run_in_virtual_time

Change = Callable[[Gateway], Awaitable[None]]


async def _nothing(gateway: Gateway) -> None:
    pass


def contents(*disks: str, held: tuple[str, ...], change: Change = _nothing) -> tuple[list[str], int]:
    """What replicas hold in the end that held other content at first ("": nothing), and the conflicts that
    were counted. ``change`` is done when the disks have what they have ("": nothing any more)."""

    async def main() -> tuple[list[str], int]:
        ones = [await replica() for _ in disks]
        gateway = Gateway(ones[0], None, *ones[1:])
        gateway.says = True
        await gateway.adapters.start_adapters(RegistryActor())
        for name, one, disk, before in zip(gateway.replicas, ones, disks, held, strict=True):
            one.engine.disk["sql"] = disk
            if before:
                one.engine.has["sql"] = before
            gateway.hear(name)
        await change(gateway)
        await asyncio.sleep(5)
        assert not any(one.engine.prepared for one in ones)
        await gateway.adapters.stop_adapters()
        return [one.engine.has.get("sql", "") for one in ones], gateway.members.conflicts

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


async def _replaced(gateway: Gateway) -> None:
    await gateway.load("sql", replace=True)


async def _replaced_in_vain(gateway: Gateway) -> None:
    with pytest.raises(AdapterInvalid, match=r"not the same on all nodes \(SHA-256 x... on r0, y... on r1\)"):
        await _replaced(gateway)


def test_no_replica_takes_a_version_that_is_not_the_same_everywhere() -> None:
    found = contents("x", "y", held=("old", "old"), change=_replaced_in_vain)
    assert found == (["old", "old"], 0), "it was found before, not after"
    found = contents("x", "x", held=("old", "old"), change=_replaced)
    assert found == (["x", "x"], 0)


def test_a_first_load_has_those_agree_that_have_it_already() -> None:
    """They found it by its name, before anybody loaded it."""

    async def loaded(gateway: Gateway) -> None:
        assert (await gateway.load("sql")).digest == "new"

    found, _ = contents("new", "new", held=("new", "old"), change=loaded)
    assert found == ["new", "new"]


def test_what_a_replica_refuses_is_taken_by_all() -> None:
    """One that held nothing has read other content than the others have."""

    async def refused(gateway: Gateway) -> None:
        for _ in range(3):
            gateway.members.on_changed("r1", "sql")

    assert contents("new", "new", held=("old", ""), change=refused) == (["new", "new"], 1)
    assert contents("x", "y", held=("old", ""), change=refused) == (["old", ""], 1)
