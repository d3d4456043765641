"""Whole engines: where a grammar leaves no choice, tokens take no step of their own, and none changes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import pytest
from support.engine_fixtures import MakeEngine, Tiny

from aioengine import AsyncEngine, SamplingParams
from aioengine.guided import Guide
from aioengine.kernels.cpu import build
from benchmarks.engine.tokens import Unforced

pytest.importorskip("llguidance")
pytestmark = [
    pytest.mark.usefixtures("preloaded_workers"),
    pytest.mark.skipif(build.shutil.which("c++") is None, reason="needs a C++ compiler"),
]

FIELDS: dict[str, Any] = {"block_size": 16, "dtype": "bfloat16", "max_model_len": 160, "max_num_seqs": 6}
KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.7, "seed": 4, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
    {"max_tokens": 17},
    {"stop": ["ba", "cc"], "min_tokens": 9},
    {"logprobs": 2, "temperature": 1.0, "seed": 5},
    {"prompt_logprobs": 1, "logit_bias": {98: -50.0}},
    {"stop_token_ids": [97], "temperature": 1.0, "seed": 6},
]


def pattern(rng: random.Random) -> str:
    """Long and short pieces without a choice, between pieces with one."""
    parts = []
    for _ in range(rng.randrange(1, 6)):
        parts.append("".join(rng.choices("abc", k=rng.choice([0, 1, 2, 7, 40]))))
        parts.append(rng.choice(["[a-d]", "(ab|ba){2}", "c*d", ""]))
    return "".join(parts) + "x"


async def answers(engine: AsyncEngine, *, forced: bool) -> tuple[list[Sequence[object]], int]:
    """Return what requests with random grammars get, and the number of steps."""
    guide, rng, before = Guide(engine), random.Random(7), engine.stats().steps

    # Compiled beforehand: the number of steps must not depend on how long that takes.
    compiled: list[Any] = [await guide.regex(pattern(rng)) for _ in range(24)]

    async def answer(i: int, constraint: Any) -> Sequence[object]:
        kind = {"max_tokens": 100, **KINDS[i % len(KINDS)], "constraint": constraint}
        if not forced:
            kind["constraint"] = Unforced(constraint)
        for _ in range(i * 7 % 30):
            await asyncio.sleep(0)
        out = await engine.complete("ab" * (1 + i % 9), SamplingParams(**kind), adapter=(None, "a")[i % 2])
        return out.token_ids, out.text, out.finish_reason, out.stop_reason, out.logprobs, out.prompt_logprobs

    found = await asyncio.gather(*(answer(i, one) for i, one in enumerate(compiled)))
    engine.check_invariants()
    assert engine.stats().kv_blocks_free == engine.stats().kv_blocks
    return found, engine.stats().steps - before


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"speculation": "ngram", "max_num_batched_tokens": 32},
        {"executor": "process"},
        {"kv_cache_memory": 11 * 16 * 200, "kv_cache_dtype": "int8", "quantization": "int8"},
    ],
    ids=["plain", "speculation", "process", "preemptions"],
)
@pytest.mark.slow
async def test_no_token_changes(fields: dict[str, Any], tiny_text: Tiny, make_engine: MakeEngine) -> None:
    async with make_engine(tiny_text, **{**FIELDS, **fields}) as engine:
        engine.register_adapter("a", tiny_text.adapters["a"])
        expected, steps = await answers(engine, forced=False)
        found, fewer = await answers(engine, forced=True)
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert one == other, f"request {i}"
        assert fewer < 0.8 * steps
        assert engine.stats().preemptions > 0 or "kv_cache_memory" not in fields
