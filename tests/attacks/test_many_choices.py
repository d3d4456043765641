"""Small requests that ask for very much at once: as many choices or inputs as may be."""

from __future__ import annotations

import asyncio
import gc
import json

import pytest
from support.longest_hold import LongestHold
from support.raw_http import POST, connected
from support.server_fixtures import MODEL, Serve, until

CHOICES = {"model": MODEL, "prompt": "Hi", "n": 128, "max_tokens": 20, "ignore_eos": True, "stream": True}
HOLD, END = 0.08, 0.25
"""Seconds of processor time that the loop may compute at a time while choices begin (22 to 41 ms; 118 to 161
ms if all begin at once), and when all these clients leave at once."""


@pytest.mark.timed
async def test_many_choices_hold_nobody_up(serve: Serve) -> None:
    body = json.dumps(CHOICES).encode()
    message = POST + b"content-length: %d\r\n\r\n" % len(body) + body
    async with serve(max_num_seqs=4) as served:
        await served.http.post("/v1/completions", json={**CHOICES, "n": 2, "stream": False})
        writers = [(await connected(served.url))[1] for _ in range(20)]
        gc.freeze()  # as a server does when it begins
        hold = LongestHold()
        for writer in writers:
            writer.write(message)
        await until(lambda: served.engine.stats().waiting > 1000)
        answer = await served.http.post("/v1/completions", json={**CHOICES, "n": 1, "stream": False})
        begun = hold.seconds
        for writer in writers:
            writer.transport.abort()
        await until(lambda: served.app.active == 0)
        gc.unfreeze()
        print(f"held {begun * 1e3:.0f} ms, {hold.seconds * 1e3:.0f} ms with the end")
        assert answer.status_code == 200
        assert begun < HOLD and hold.seconds < END
        assert served.engine.stats().waiting == 0


@pytest.mark.parametrize("n", [2, 128])
async def test_each_choice_has_its_turn(n: int, serve: Serve) -> None:
    """Also those of requests that were begun while others left."""
    async with serve() as served:

        async def leaving(seconds: float) -> None:
            body = {**CHOICES, "n": 128, "stream": False}
            sending = asyncio.create_task(served.http.post("/v1/completions", json=body))
            await asyncio.wait([sending], timeout=seconds)
            sending.cancel()

        left = [asyncio.create_task(leaving(0.002 * i)) for i in range(10)]
        answer = await served.http.post("/v1/completions", json={**CHOICES, "n": n, "stream": False})
        assert [choice["index"] for choice in answer.json()["choices"]] == list(range(n))
        await asyncio.wait(left)
        await until(lambda: served.app.active == 0)
        served.engine.check_invariants()
