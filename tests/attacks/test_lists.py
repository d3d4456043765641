"""Lists of thousands of adapters: nobody waits for who asks for one."""

from __future__ import annotations

import gc

import pytest
from support.engine_fixtures import Tiny
from support.longest_hold import LongestHold
from support.selection import mostly_slow
from support.server_fixtures import Serve

NAMES = 10_000
HOLD = 0.05
"""Seconds of processor time; to write them all on the loop would take several times as many."""
PATHS = ["/v1/models", "/v1/models/nobody", "/debug/requests", "/metrics"]


@pytest.mark.timed
@pytest.mark.parametrize("path", mostly_slow(PATHS, "/v1/models"))
async def test_a_list_holds_nobody_up(path: str, serve: Serve, tiny_text: Tiny) -> None:
    async with serve(settings={"admin_keys": {"sk-admin": "ops"}}, key="sk-admin") as served:
        for index in range(NAMES):
            served.engine.register_adapter(f"n{index}", tiny_text.adapters["a"])
        gc.freeze()  # as a server does when it begins
        hold = LongestHold()
        for _ in range(3):
            answer = await served.http.get(path)
            assert answer.status_code == (404 if path.endswith("nobody") else 200)
        gc.unfreeze()
        assert hold.seconds < HOLD
