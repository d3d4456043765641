"""A model with adapters, served by an engine, against transformers and peft in float32, token for token."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from support.any_models import AnyModel

from aioengine import AsyncEngine, EngineConfig, LoRAConfig, SamplingParams
from aioengine.errors import ConfigError

NEW = 6
"""Tokens of an output."""


def engine_of(folder: Path, **fields: Any) -> AsyncEngine:
    lora = LoRAConfig(**{"max_loras": 1, "max_lora_rank": 4, "max_cpu_loras": 1, **fields.pop("lora", {})})
    defaults: dict[str, Any] = {"model_impl": "transformers", "dtype": "float32", "device": "cpu"}
    defaults |= {"block_size": 4, "max_model_len": 64, "max_num_batched_tokens": 24, "max_num_seqs": 8}
    defaults |= {"kv_cache_memory": "1MiB"}
    return AsyncEngine(EngineConfig(model=str(folder), lora=lora, **{**defaults, **fields}))


async def refused(folder: Path, *words: str, **fields: Any) -> None:
    """Start an engine of a model that cannot be served: the error says the words."""
    with pytest.raises(ConfigError) as caught:
        async with engine_of(folder, **fields):
            raise AssertionError("it started")
    for word in words:
        assert word in str(caught.value)


def prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(3, 128), k=length)


async def check(model: AnyModel, engine: AsyncEngine) -> None:
    """Greedy tokens and their log-probabilities; twice, so that slots and prefixes are used again."""
    for name, folder in model.adapters.items():
        engine.register_adapter(name, folder)
    work = [(None, 19), ("plain", 7), ("all-linear", 11), (None, 3), ("plain", 17)]
    prompts = [prompt(seed, length) for seed, (_, length) in enumerate(work)]
    params = SamplingParams(max_tokens=NEW, ignore_eos=True, logprobs=1)
    first: list[list[int]] = []
    for again in (False, True):
        outputs = await asyncio.gather(
            *(
                engine.complete(tokens, params, adapter=name)
                for (name, _), tokens in zip(work, prompts, strict=True)
            )
        )
        if again:
            assert [output.token_ids for output in outputs] == first
            break
        first = [output.token_ids for output in outputs]
        for (name, _), tokens, output in zip(work, prompts, outputs, strict=True):
            logits = model.logits([*tokens, *output.token_ids[:-1]], name)[len(tokens) - 1 :]
            assert output.token_ids == logits.argmax(-1).tolist(), name
            expected = logits.log_softmax(-1).amax(-1)
            assert output.logprobs is not None
            found = torch.tensor([entry.logprob for entry in output.logprobs])
            bound = 1e-4 * max(1.0, float(logits.abs().max()))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=bound)
    stats = engine.stats()
    assert stats.slot_loads > 2 and stats.cached_tokens > 0, "slots and prefixes were used again"
    engine.check_invariants()
