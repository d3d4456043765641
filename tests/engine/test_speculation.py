"""Whole engines: with speculation every request has the tokens that it has without, bit for bit."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import pytest
from support.engine_fixtures import ADAPTERS, MakeEngine, Tiny, prompt_of, register

from aioengine import AsyncEngine, SamplingParams
from aioengine.errors import AioEngineError, ConfigError
from aioengine.events import TokensProposed
from aioengine.kernels.cpu import build

needs_compiler = pytest.mark.skipif(build.shutil.which("c++") is None, reason="needs a C++ compiler")


CACHE = {"none": "auto", "int8": "int8"}
"""kv_cache_dtype, by quantization."""


class Alternating:
    """Allows a quarter of the tokens at each place, and after some tokens only one."""

    def allowed(self, output: Sequence[int]) -> bytes:
        if len(output) % 5 == 3:
            return (1 << output[0] % 250 + 3).to_bytes(32, "little")
        return bytes([0x11 << len(output) % 4]) * 32


FIELDS: dict[str, Any] = {
    "block_size": 16, "max_loras": 3, "max_cpu_loras": 16, "dtype": "bfloat16", "max_model_len": 160,
}  # fmt: skip
FEW = {"logit_bias": dict.fromkeys((40, 41, 42, 43), 30.0)}
"""Of four tokens three soon stand beside each other again."""
KINDS: list[dict[str, Any]] = [
    {"logprobs": 2},
    {"logprobs": 1, **FEW},
    {"temperature": 0.3, "seed": 7, "logprobs": 1, **FEW},
    {"temperature": 1.0, "seed": 8, "top_p": 0.9},
    {"frequency_penalty": 0.02, "presence_penalty": 0.1, "repetition_penalty": 1.01, **FEW},
    {"constraint": Alternating(), "prompt_logprobs": 1, **FEW},
    {"min_tokens": 30, "stop_token_ids": [41, *range(50, 70)], **FEW},
]
REQUESTS = [
    (name, i, {"max_tokens": 20 + 6 * i, "ignore_eos": True, **KINDS[i % len(KINDS)]})
    for i, name in enumerate((None, *ADAPTERS, None, None, *list(ADAPTERS)[:2]))
]


def prompt(i: int) -> list[int]:
    """A piece that is repeated, so that there is something to look up."""
    return prompt_of(i % 4, 3 + i) * 3


async def answer(engine: AsyncEngine, name: str | None, i: int, kind: dict[str, Any]) -> Sequence[object]:
    out = await engine.complete(prompt(i), SamplingParams(**kind), adapter=name, tenant=str(i % 3))
    return out.token_ids, out.finish_reason, out.logprobs, out.prompt_logprobs


@needs_compiler
@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.slow
async def test_no_token_changes(quantization: str, tiny: Tiny, make_engine: MakeEngine) -> None:
    """With random arrivals, swaps, preemptions and aborts."""
    fields = {**FIELDS, "quantization": quantization, "kv_cache_dtype": CACHE[quantization]}
    async with make_engine(tiny, **fields) as engine:
        register(engine, tiny)
        expected = [await answer(engine, *request) for request in REQUESTS]
    for more in (
        {"max_num_seqs": 5},
        {"max_num_batched_tokens": 48, "max_num_seqs": 6, "kv_cache_memory": 14 * 16 * 384},
    ):
        async with make_engine(tiny, **{**fields, **more}, speculation="ngram") as engine:
            seen: list[TokensProposed] = []
            engine.add_listener(seen.append, TokensProposed)
            register(engine, tiny)
            rng = random.Random(len(more))

            async def arrive(request: tuple[Any, ...], after: int) -> Sequence[object]:
                for _ in range(after):
                    await asyncio.sleep(0)
                return await answer(engine, *request)

            async def leave(request: tuple[Any, ...], after: int) -> None:
                task = asyncio.ensure_future(arrive(request, 0))
                for _ in range(after):
                    await asyncio.sleep(0)
                task.cancel()

            leaving = [leave(r, rng.randrange(300)) for r in rng.sample(REQUESTS, 4)]
            staying = [arrive(r, rng.randrange(200)) for r in REQUESTS]
            found, _ = await asyncio.gather(asyncio.gather(*staying), asyncio.gather(*leaving))
            for request, one, other in zip(REQUESTS, found, expected, strict=True):
                assert one == other, f"{more}: {request}"
            stats = engine.stats()
            engine.check_invariants()
        assert sum(e.accepted for e in seen) > 100 and sum(e.proposed - e.accepted for e in seen) > 100
        assert stats.slot_loads > len(stats.slots), "adapters were swapped"
        assert stats.preemptions > 0 or "kv_cache_memory" not in more
        assert stats.kv_blocks_free == stats.kv_blocks


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"speculation": "medusa"}, r"speculation='medusa': allowed are none, ngram"),
        ({"speculation": "ngram", "device": "cuda"}, r"speculation='ngram': on CUDA .*device='cpu'"),
    ],
)
def test_settings_that_cannot_be(
    fields: dict[str, Any], why: str, tiny: Tiny, make_engine: MakeEngine
) -> None:
    with pytest.raises(ConfigError, match=why):
        make_engine(tiny, **fields)


async def test_a_path_that_is_not_exact_is_refused(tiny: Tiny, make_engine: MakeEngine) -> None:
    with pytest.raises(AioEngineError, match=r"speculation='ngram': .*torch's.*speculation='none'"):
        async with make_engine(tiny, speculation="ngram", block_size=4):
            pass
