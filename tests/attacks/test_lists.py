"""Lists of thousands of adapters: nobody waits for who asks for one, and they say what is."""

from __future__ import annotations

import gc
import random

import pytest
from support.engine_fixtures import MakeEngine, Tiny, greedy
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


@pytest.mark.parametrize("seed", range(3))
async def test_the_list_says_what_each_one_is(seed: int, tiny_text: Tiny, make_engine: MakeEngine) -> None:
    draw = random.Random(seed)
    names = [f"n{index}" for index in range(8)]
    async with make_engine(tiny_text, max_loras=1, max_cpu_loras=2) as engine:
        for _ in range(60):
            name = draw.choice(names)
            path = tiny_text.adapters[draw.choice(sorted(tiny_text.adapters))]
            match draw.randrange(6):
                case 0:
                    if engine.find_adapter(name) is None:
                        engine.register_adapter(name, path)
                case 1:
                    await engine.load_adapter(name, path, replace=True)
                case 2:
                    if engine.find_adapter(name) is not None:
                        await engine.complete("Hi", greedy(2), adapter=name)
                case 3:
                    if engine.find_adapter(name) is not None:
                        await engine.unload_adapter(name)
                case 4:
                    if engine.find_adapter(name) is not None and draw.random() < 0.5:
                        await engine.complete("Hi", greedy(2), adapter={name: 0.5})
                case 5:
                    found = engine.adapters()
                    assert {info.name: info for info in found} == {
                        each: info for each in names if (info := engine.find_adapter(each)) is not None
                    }
                    assert len(found) == len({info.name for info in found}) <= engine.count_adapters()
        assert engine.find_adapter("nobody") is None
