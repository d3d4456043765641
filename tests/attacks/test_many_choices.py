"""Small requests that ask for as many choices as may be."""

from __future__ import annotations

import asyncio

import pytest
from support.server_fixtures import MODEL, Serve, until

CHOICES = {"model": MODEL, "prompt": "Hi", "n": 128, "max_tokens": 20, "ignore_eos": True}


@pytest.mark.parametrize("n", [2, 128])
async def test_each_choice_has_its_turn(n: int, serve: Serve) -> None:
    """Also those of requests that were begun while others left."""
    async with serve() as served:

        async def leaving(seconds: float) -> None:
            body = CHOICES
            sending = asyncio.create_task(served.http.post("/v1/completions", json=body))
            await asyncio.wait([sending], timeout=seconds)
            sending.cancel()

        left = [asyncio.create_task(leaving(0.002 * i)) for i in range(10)]
        answer = await served.http.post("/v1/completions", json={**CHOICES, "n": n})
        assert [choice["index"] for choice in answer.json()["choices"]] == list(range(n))
        await asyncio.wait(left)
        await until(lambda: served.app.active == 0)
        served.engine.check_invariants()
