"""What a replica says of the adapters that it holds, as routers take it."""

from __future__ import annotations

import pytest
from support.adapter_infos import adapter_info

from aioengine.fleet.wire import Residency
from aioengine.info import AdapterInfo


def info(name: str, location: str, nbytes: int) -> AdapterInfo:
    return adapter_info(name, bytes=nbytes, location=location)


@pytest.mark.parametrize(
    ("held", "where", "nbytes"),
    [
        ([info("a", "slot", 100), info("b", "loading", 0)], (["a"], [], ["b"]), {"a": 100}),
        ([info("a", "disk", 300)], ([], [], []), {}),
    ],
)
def test_what_a_replica_holds_has_its_size(
    held: list[AdapterInfo], where: tuple[list[str], ...], nbytes: dict[str, int]
) -> None:
    tiers = Residency([], held).tiers
    assert tuple(map(list, tiers[:3])) == where and tiers[3] == nbytes
