"""Sliding windows in all layers: no token changes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from support.any_models import build_any
from support.served_models import engine_of, prompt

from aioengine import SamplingParams

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
    """Six requests of up to 100 tokens, twice, so that blocks and slots are used again."""
    monkeypatch.setenv("AIOENGINE_KERNELS", backend)
    model = build_any(tmp_path, "mistral", **SIZES)
    memory = 256 * TOKEN_BYTES // options.get("tensor_parallel_size", 1)
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
