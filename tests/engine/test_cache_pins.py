"""``cache_pins``: a prefix stays whatever else runs, and no token changes."""

from __future__ import annotations

from typing import Any

import pytest
from support.engine_fixtures import MakeEngine, Tiny, greedy, prompt_of

from aioengine import AsyncEngine, CachePin
from aioengine.errors import RequestInvalid
from aioengine.request import RequestOptions

PREFIX = prompt_of(1, 41)


async def flood(engine: AsyncEngine) -> None:
    """Compute other prompts, of more tokens than the KV cache has room for."""
    for seed in range(engine.plan.num_blocks * engine.plan.block_size // 60 + 1):
        await engine.complete(prompt_of(1000 + seed, 60), greedy(1))


async def test_a_pinned_prefix_is_still_there_after_a_flood(tiny: Tiny, make_engine: MakeEngine) -> None:
    async with make_engine(tiny, kv_cache_memory="128KiB", max_prefix_pins=0.5) as engine:
        await engine.load_adapter("a", tiny.adapters["qv-only"])
        pin = CachePin(tokens=40, seconds=3600)
        for adapter in (None, "a"):
            expected = tiny.expected([*PREFIX, 9], 6, None if adapter is None else "qv-only")
            first = await engine.complete([*PREFIX, 7], greedy(4), adapter=adapter, cache_pins=[pin])
            assert (first.cached_tokens, first.pinned_tokens) == (0, 40)
            await flood(engine)
            again = await engine.complete([*PREFIX, 9], greedy(6), adapter=adapter)
            assert (again.cached_tokens, again.pinned_tokens) == (40, 0)
            assert again.token_ids == expected
        assert engine.stats().kv_blocks_pinned == 20
        assert engine.stats().kv_blocks_free == engine.stats().kv_blocks
        plain = await engine.complete([*PREFIX[::-1], 7], greedy(4))
        await flood(engine)
        again = await engine.complete([*PREFIX[::-1], 7], greedy(4))
        assert (plain.pinned_tokens, again.cached_tokens) == (0, 0)
        assert again.token_ids == plain.token_ids


@pytest.mark.parametrize(
    ("pin", "text"),
    [
        ({"tokens": 0}, "tokens="),
        ({"tokens": True}, "tokens="),
        ({"tokens": 4, "seconds": 0}, "seconds="),
        ({"tokens": 4, "seconds": float("inf")}, "seconds="),
    ],
)
def test_a_pin_is_checked(pin: dict[str, Any], text: str) -> None:
    with pytest.raises(RequestInvalid, match=text):
        CachePin(**pin)


@pytest.mark.parametrize("pins", [[CachePin(tokens=1)] * 5, [3], "ab", 3])
def test_pins_are_checked(pins: Any) -> None:
    with pytest.raises(RequestInvalid, match="cache_pins"):
        RequestOptions(cache_pins=pins)
