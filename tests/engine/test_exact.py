"""The engine against transformers + peft in float32, token for token, through every path."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from support.engine_fixtures import ADAPTERS, MakeEngine, Tiny, check_tokens, prompt_of, register
from support.selection import mostly_slow_rows
from support.tiny_models import ALL_MODULES, build_adapter, build_model

from aioengine import events
from aioengine.errors import AdapterInvalid
from aioengine.model.spec import EMBEDDING_MODULES

PATHS: dict[str, dict[str, Any]] = {
    "whole-prompts": {"enable_prefix_caching": False},
    "chunked-prefill": {"max_num_batched_tokens": 16, "max_num_seqs": 8},
    "paced-prefill": {"max_step_seconds": 1e-9},  # every chunk is as small as it may be
    "preempted": {"max_model_len": 64, "max_num_seqs": 6},
    "slots-by-bytes": {"slot_memory": "256KiB", "max_loras": 6, "max_cpu_loras": 8},
}
DORA_BIAS_AND_EMBEDDINGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 8},
    "dora": {"r": 16, "use_dora": True},
    "rslora-dora": {"r": 9, "lora_alpha": 6, "use_rslora": True, "use_dora": True},
    "bias": {"r": 4, "lora_alpha": 8, "lora_bias": True},
    "head": {"r": 5, "target_modules": ["lm_head", "o_proj"]},
    "embedding": {"r": 7, "target_modules": ["embed_tokens", "v_proj"]},
    "everything": {"r": 6, "target_modules": [*ALL_MODULES, *EMBEDDING_MODULES], "use_dora": True},
}
"""PEFT configurations; peft warns of some, and they are served exactly."""
MIXED = [
    *(("qwen3", path) for path in PATHS),
    *(("llama", path) for path in ("whole-prompts", "preempted")),
    *(("mistral", path) for path in ("chunked-prefill", "slots-by-bytes")),
    *(("qwen2", path) for path in ("paced-prefill", "preempted")),
]
KV_TOKEN_BYTES = {"llama": 768, "mistral": 768, "qwen2": 768, "qwen3": 1536}


@pytest.mark.parametrize(("family", "path"), mostly_slow_rows(MIXED, *MIXED[: len(PATHS)]))
async def test_base_and_all_adapters_mixed(
    family: str, path: str, tiny_of: Callable[[str], Tiny], make_engine: MakeEngine
) -> None:
    tiny = tiny_of(family)
    names = [None, *ADAPTERS, None, None]
    lengths = [29, 5, 17, 33, 9, 21, 13, 26, 2, 30, 20, 31]
    asked = [(prompt_of(i, n), name) for i, (n, name) in enumerate(zip(lengths, names, strict=True))]
    fields = dict(PATHS[path])
    if path == "preempted":  # little more than one request of the full length: they must take turns
        fields["kv_cache_memory"] = 72 * KV_TOKEN_BYTES[family]
    async with make_engine(tiny, **fields) as engine:
        register(engine, tiny)
        outputs = await check_tokens(engine, tiny, asked)
        assert {output.finish_reason for output in outputs} == {"length"}
        stats = engine.stats()
        engine.check_invariants()
    assert stats.slot_loads >= len(ADAPTERS) > len(stats.slots), "fewer slots than adapters"
    assert (stats.preemptions > 0) == (path == "preempted")


@pytest.fixture(scope="module")
def special(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A tiny qwen2, which has biases, with tied embeddings, and adapters beyond LoRA on linears."""
    root = tmp_path_factory.mktemp("special")
    model = build_model(root / "model", "qwen2", tie_word_embeddings=True)
    adapters = {
        name: build_adapter(model, root / name, seed=seed, **config)
        for seed, (name, config) in enumerate(DORA_BIAS_AND_EMBEDDINGS.items())
    }
    return Tiny(model, adapters)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.slow
async def test_dora_biases_and_embeddings_mixed_with_plain_adapters(
    path: str, special: Tiny, make_engine: MakeEngine
) -> None:
    names = [None, *DORA_BIAS_AND_EMBEDDINGS, None, "plain"]
    lengths = [29, 5, 17, 33, 9, 21, 13, 26, 2, 30]
    asked = [(prompt_of(i, n), name) for i, (n, name) in enumerate(zip(lengths, names, strict=True))]
    fields: dict[str, Any] = {"target_modules": [*ALL_MODULES, *EMBEDDING_MODULES], **PATHS[path]}
    if path == "preempted":
        fields["kv_cache_memory"] = 72 * KV_TOKEN_BYTES["qwen2"]
    async with make_engine(special, **{"max_cpu_loras": 8, **fields}) as engine:
        register(engine, special)
        for _ in range(2):  # the second time through reused slots and, if it is on, the prefix cache
            await check_tokens(engine, special, asked, 16)
        stats = engine.stats()
        engine.check_invariants()
    assert stats.slot_loads > len(special.adapters) > len(stats.slots), "slots were reused"
    assert (stats.preemptions > 0) == (path == "preempted")


@pytest.mark.filterwarnings("ignore::UserWarning")
async def test_embeddings_are_opt_in(special: Tiny, make_engine: MakeEngine) -> None:
    async with make_engine(special) as engine:
        for name, module in (("head", "lm_head"), ("embedding", "embed_tokens")):
            with pytest.raises(AdapterInvalid, match=rf"{module}.*LoRAConfig\.target_modules"):
                await engine.load_adapter(name, special.adapters[name])
        await engine.load_adapter("dora", special.adapters["dora"])
        await check_tokens(engine, special, [(prompt_of(0, 9), "dora")])


async def test_adapters_change_the_output(tiny: Tiny) -> None:
    prompt = prompt_of(0, 12)
    outputs = [tuple(tiny.expected(prompt, 24, name)) for name in (None, *ADAPTERS)]
    assert len(set(outputs)) == len(outputs), "or the tests above would prove nothing"


async def test_prefix_cache_hits_give_the_same_tokens(tiny: Tiny, make_engine: MakeEngine) -> None:
    shared = prompt_of(1, 24)
    async with make_engine(tiny) as engine:
        engine.register_adapter("rank-3", tiny.adapters["rank-3"])
        for name in (None, "rank-3"):
            for tail, cached in (([], 0), ([7, 8, 9], 24), ([9, 8], 24), ([], 20)):
                [output] = await check_tokens(engine, tiny, [(shared + tail, name)])
                assert output.cached_tokens == cached


@pytest.mark.slow
async def test_requests_join_and_leave_a_running_batch(tiny: Tiny, make_engine: MakeEngine) -> None:
    async with make_engine(tiny, max_loras=3) as engine:
        register(engine, tiny)
        names = [None, *ADAPTERS] * 3
        swaps: list[events.Event] = []
        engine.add_listener(swaps.append)

        async def one(i: int) -> None:
            for _ in range(i % 7):
                await asyncio.sleep(0)
            await check_tokens(engine, tiny, [(prompt_of(i, 3 + i), names[i])], 24 + i % 5)

        await asyncio.gather(*(one(i) for i in range(len(names))))
        placed = [e for e in swaps if isinstance(e, events.AdapterPlaced)]
        mixed = [e for e in swaps if isinstance(e, events.StepFinished) and e.adapters == 3]
        assert len(placed) >= len(ADAPTERS)
        assert mixed, "several adapters in one batch"
