"""Connections by address."""

from __future__ import annotations

import pytest

from aioengine.server.transport.crowd import Crowd


def opened(crowd: Crowd, owner: str) -> int:
    """Open as many as it may; returns the number."""
    count = 0
    while crowd.enter(owner):
        count += 1
    return count


def test_one_address_does_not_shut_others_out() -> None:
    crowd = Crowd(4096)
    assert [opened(crowd, owner) for owner in "abcd"] == [3072, 768, 192, 48]
    assert crowd.enter("bystander")
    for _ in range(3072):
        crowd.leave("a")
    assert opened(crowd, "b") > 0 and crowd.enter("a")


@pytest.mark.parametrize(("most", "one"), [(1, 1), (2, 2), (3, 3), (8, 6)])
def test_small_bounds(most: int, one: int) -> None:
    assert opened(Crowd(most), "a") == one
