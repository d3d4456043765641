"""Lists of thousands of adapters: nobody waits for who asks for one, and they say what is."""

from __future__ import annotations

import random

import httpx
import pytest
from support.engine_fixtures import MakeEngine, Tiny, greedy

NAMES = 10_000
HOLD = 0.03
"""Seconds of processor time; to describe and write them all on the loop would take several times as many."""
PATHS = ["/v1/models", "/v1/models/n7", "/v1/models/nobody", "/debug/adapters", "/debug/requests", "/metrics"]


async def _first_event(http: httpx.AsyncClient) -> httpx.Response:
    async with http.stream("GET", "/events") as answer:
        found = b""
        async for part in answer.aiter_bytes():
            found += part
            if b"\n\n" in found:
                break
    assert found.count(b'["n') == NAMES
    return answer


@pytest.mark.parametrize("seed", range(3))
async def test_the_list_says_what_each_one_is(seed: int, tiny_text: Tiny, make_engine: MakeEngine) -> None:
    """Most adapters are described once; what happens to one is seen in the next list, or in a later one."""
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
