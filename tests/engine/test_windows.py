"""Sliding windows in all layers: blocks that no layer sees any more go to others, and no token changes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from support.any_models import build_any, config_of
from support.served_models import engine_of, prompt

from aioengine import EngineConfig, SamplingParams
from aioengine.errors import ConfigError
from aioengine.memory_plan import plan_memory
from aioengine.model.files.resolve import read_spec
from aioengine.model.spec import INT8_SCALE_BYTES, ModelSpec

pytestmark = [
    pytest.mark.usefixtures("preloaded_workers"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
SIZES: dict[str, Any] = {"hidden_size": 64, "head_dim": 16, "sliding_window": 9}
TOKEN_BYTES = 2 * 2 * 2 * 16 * 4
NEW = 40


@pytest.mark.parametrize(
    ("backend", "block_size", "options"),
    [
        ("cpu", 16, {}),
        ("torch", 4, {}),
        ("cpu", 16, {"speculation": "ngram"}),
        ("cpu", 16, {"executor": "process"}),
        ("cpu", 16, {"executor": "process", "tensor_parallel_size": 2}),
    ],
)
@pytest.mark.slow
async def test_tokens_are_those_of_the_whole_cache(
    backend: str, block_size: int, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six requests of up to 100 tokens, in a pool that has no room for all of one of these; twice, so that
    slots are used again."""
    monkeypatch.setenv("AIOENGINE_KERNELS", backend)
    model = build_any(tmp_path, "mistral", **SIZES)
    memory = 96 * TOKEN_BYTES // options.get("tensor_parallel_size", 1)
    options = {**options, "block_size": block_size, "max_model_len": 128, "kv_cache_memory": memory}
    work = [(None, 60), ("plain", 33), ("all-linear", 17), (None, 3), ("plain", 50), (None, 45)]
    prompts = [prompt(seed, length) for seed, (_, length) in enumerate(work)]
    params = SamplingParams(max_tokens=NEW, ignore_eos=True)
    async with engine_of(model.folder, model_impl="native", **options) as engine:
        for name, folder in model.adapters.items():
            engine.register_adapter(name, folder)
        for _ in range(2):
            outputs = await asyncio.gather(
                *(
                    engine.complete(tokens, params, adapter=name)
                    for (name, _), tokens in zip(work, prompts, strict=True)
                )
            )
            for (name, _), tokens, output in zip(work, prompts, outputs, strict=True):
                logits = model.logits([*tokens, *output.token_ids[:-1]], name)[len(tokens) - 1 :]
                assert output.token_ids == logits.argmax(-1).tolist(), name
        first = await engine.complete(prompts[1], params)
        again = await engine.complete(prompts[1], params)
        assert again.token_ids == first.token_ids and again.cached_tokens == 32
        engine.check_invariants()
        assert engine.stats().kv_blocks_free == engine.stats().kv_blocks


@pytest.mark.parametrize("executor", ["thread", "process"])
@pytest.mark.slow
async def test_in_int8_it_is_the_whole_cache_too(
    executor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits as where no block is given back."""
    model = build_any(tmp_path, "mistral", **SIZES)
    prompts = [prompt(seed, length) for seed, length in enumerate((60, 33, 3, 45))]
    params = SamplingParams(max_tokens=NEW, ignore_eos=True, logprobs=1)
    options = {"kv_cache_dtype": "int8", "block_size": 16, "max_model_len": 128, "executor": executor}

    async def found(tokens: int) -> list[Any]:
        memory = tokens * 2 * 2 * 2 * (16 + INT8_SCALE_BYTES)
        async with engine_of(model.folder, model_impl="native", kv_cache_memory=memory, **options) as engine:
            assert engine.stats().kv_blocks == tokens // 16
            outputs = await asyncio.gather(*(engine.complete(tokens, params) for tokens in prompts))
            assert engine.stats().kv_blocks_free == engine.stats().kv_blocks
        return [(output.token_ids, output.logprobs) for output in outputs]

    windows = await found(96)
    monkeypatch.setattr(ModelSpec, "longest_window", None)
    assert windows == await found(4 * 128)


def test_the_plan_says_what_a_request_holds(tmp_path: Path) -> None:
    def detail(folder: Path, **fields: Any) -> str:
        config_of(fields.pop("family", "mistral"), **SIZES, **fields).save_pretrained(folder)
        config = EngineConfig(
            model=str(folder),
            dtype="float32",
            kv_cache_memory="64KiB",
            max_num_batched_tokens=24,
            max_num_seqs=8,
        )
        plan = plan_memory(read_spec(folder, "native"), config, device="cpu")
        return next(detail for part, detail, _ in plan.rows() if part == "KV blocks")

    assert "a request holds at most 4" in detail(tmp_path)
    assert "a request holds at most 8" in detail(tmp_path, family="llama")
    with pytest.raises(ConfigError, match="is less than one request of max_model_len=256"):
        detail(tmp_path, family="llama", max_position_embeddings=256)
