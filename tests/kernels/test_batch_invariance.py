"""Whole engines: a request's tokens and log-probabilities are the same bits alone and in a crowd."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from support.engine_fixtures import ADAPTERS, MakeEngine, Tiny, prompt_of
from support.selection import mostly_slow_rows

from aioengine import AsyncEngine, RequestOutput, SamplingParams
from aioengine.errors import ConfigError
from aioengine.kernels.cpu import build

pytestmark = pytest.mark.skipif(build.shutil.which("c++") is None, reason="needs a C++ compiler")
BEST = next(iter(build.levels()))
COMPILED = {"block_size": 16, "batch_invariant": True, "max_loras": 3, "max_cpu_loras": 16}
CASES = [
    (BEST, "llama", {"dtype": "bfloat16"}),
    (BEST, "gemma2", {"dtype": "bfloat16", "quantization": "int8", "kv_cache_dtype": "int8"}),
    (BEST, "gemma2", {"dtype": "bfloat16", "quantization": "int4", "lora_dtype": "int8"}),
    (BEST, "qwen2", {"dtype": "float32", "lora_dtype": "int8"}),
    ("generic", "gemma2", {"dtype": "bfloat16"}),
    ("generic", "llama", {"dtype": "bfloat16", "quantization": "int8", "kv_cache_dtype": "int8"}),
]
"""Instruction set, family, fields of the engine."""
KINDS = [
    SamplingParams(max_tokens=20, ignore_eos=True, logprobs=3),
    SamplingParams(max_tokens=20, ignore_eos=True, temperature=1.0, seed=7, logprobs=1),
    SamplingParams(max_tokens=9, ignore_eos=True, temperature=0.8, top_p=0.9, seed=8, prompt_logprobs=2),
]
REQUESTS = [
    (name, length, kind)
    for kind in range(len(KINDS))
    for name, length in zip((None, *ADAPTERS), range(3, 93, 9), strict=True)
]
"""Adapter, length of the prompt, kind."""
PATHS: dict[str, dict[str, Any]] = {
    "whole-prompts": {},
    "chunked": {"max_num_batched_tokens": 16, "max_num_seqs": 8},
    "preempted": {"max_num_seqs": 6, "max_model_len": 128},
}


async def answer(engine: AsyncEngine, request: tuple[str | None, int, int]) -> RequestOutput:
    name, length, kind = request
    return await engine.complete(prompt_of(length % 4, length), KINDS[kind], adapter=name)


def bits(output: RequestOutput) -> Sequence[object]:
    return output.token_ids, output.logprobs, output.prompt_logprobs


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("level", "_threads")
@pytest.mark.parametrize(("level", "family", "fields"), mostly_slow_rows(CASES, CASES[1]), indirect=["level"])
async def test_a_crowd_changes_no_bit(
    family: str, fields: dict[str, Any], tiny_of: Callable[[str], Tiny], make_engine: MakeEngine
) -> None:
    """On two threads, in chunks, preempted, swapped, in shared blocks, or after tokens that were decoded
    elsewhere: what a request gets alone on one thread."""
    tiny, fields = tiny_of(family), {**COMPILED, **fields}
    torch.set_num_threads(1)
    async with make_engine(tiny, **fields, enable_prefix_caching=False) as engine:
        for name, folder in tiny.adapters.items():
            engine.register_adapter(name, folder)
        alone = [bits(await answer(engine, request)) for request in REQUESTS]
        assert engine.info.batch_invariant
        block = 2 * 2**20 // engine.stats().kv_blocks  # bytes
    torch.set_num_threads(2)
    for path, more in PATHS.items():
        if path == "preempted":  # not much more than one request of the full length
            more = {**more, "kv_cache_memory": 10 * block}
        async with make_engine(tiny, **{**fields, **more}) as engine:
            for name, folder in tiny.adapters.items():
                engine.register_adapter(name, folder)
            rng = random.Random(path)

            async def arrive(request: tuple[str | None, int, int], after: int) -> Sequence[object]:
                for _ in range(after):
                    await asyncio.sleep(0)
                return bits(await answer(engine, request))

            for _ in range(2):  # the second time through the prefix cache
                together = await asyncio.gather(*(arrive(r, rng.randrange(200)) for r in REQUESTS))
                for request, found, expected in zip(REQUESTS, together, alone, strict=True):
                    assert found == expected, f"{path}: {request}"
            for (name, length, kind), (whole, *_) in zip(REQUESTS[:20:3], alone[:20:3], strict=True):
                rest = await engine.complete(
                    prompt_of(length % 4, length), KINDS[kind], adapter=name, output=whole[:5], replay=False
                )
                assert rest.token_ids == whole
            stats = engine.stats()
        assert stats.slot_loads > len(ADAPTERS), "adapters were swapped"
        assert (stats.preemptions > 0) == (path == "preempted")
        assert stats.cached_tokens > 0


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"batch_invariant": "yes"}, r"batch_invariant='yes': must be 'auto', True or False"),
        ({"kv_cache_dtype": "int4"}, r"kv_cache_dtype='int4': allowed are auto, int8, fp8"),
        ({"batch_invariant": True, "device": "cuda"}, r"batch_invariant=True: .*cuBLAS.*device='cpu'"),
    ],
)
def test_settings_that_cannot_be(
    fields: dict[str, Any], why: str, tiny: Tiny, make_engine: MakeEngine
) -> None:
    with pytest.raises(ConfigError, match=why):
        make_engine(tiny, **fields)


async def test_a_path_that_cannot_have_it_says_why(tiny: Tiny, make_engine: MakeEngine) -> None:
    with pytest.raises(ConfigError, match=r"kv_cache_dtype='fp8': only .*CUDA.*kv_cache_dtype='int8'"):
        async with make_engine(tiny, kv_cache_dtype="fp8"):
            pass
    with pytest.raises(ConfigError, match=r"batch_invariant=True: .*torch's.*block_size 4.*'auto'"):
        async with make_engine(tiny, batch_invariant=True, block_size=4):
            pass
    with pytest.raises(ConfigError, match=r"kv_cache_dtype='int8': .*block_size 4.*'auto'"):
        async with make_engine(tiny, kv_cache_dtype="int8", block_size=4):
            pass
    async with make_engine(tiny, block_size=4) as engine:
        assert not engine.info.batch_invariant
