"""A model with adapters, served by an engine, against transformers and peft in float32, token for token."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor

from aioengine import AsyncEngine, EngineConfig, LoRAConfig, RequestOutput, SamplingParams
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


class Served(Protocol):
    """A model on disk with adapters, and what transformers and peft make of them."""

    adapters: dict[str, Path]

    def logits(self, tokens: Sequence[int], adapter: str | None) -> Tensor:
        """[len(tokens), vocab], in one pass."""


async def check(model: Served, engine: AsyncEngine, *, alone: bool = False) -> None:
    """Compare greedy tokens and their log-probabilities, with all adapters side by side; twice, so that slots
    and prefixes are used again. ``alone``: no bit of them depends on the batch."""
    for name, folder in model.adapters.items():
        engine.register_adapter(name, folder)
    names = [None, *model.adapters, None, next(iter(model.adapters))]
    asked = [(name, prompt(seed, 5 + 3 * seed)) for seed, name in enumerate(names)]
    params = SamplingParams(max_tokens=NEW, ignore_eos=True, logprobs=1)

    async def answer(name: str | None, tokens: list[int]) -> RequestOutput:
        return await engine.complete(tokens, params, adapter=name)

    outputs: list[RequestOutput] = []
    for _ in range(2):
        outputs = await asyncio.gather(*(answer(*one) for one in asked))
        for (name, tokens), output in zip(asked, outputs, strict=True):
            logits = model.logits([*tokens, *output.token_ids[:-1]], name)[len(tokens) - 1 :]
            assert output.token_ids == logits.argmax(-1).tolist(), name
            expected = logits.log_softmax(-1).amax(-1)
            found = torch.tensor([entry.logprob for entry in output.logprobs or ()])
            bound = 1e-4 * max(1.0, float(logits.abs().max()))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=bound)
    stats = engine.stats()
    assert stats.cached_tokens > 0, "prefixes were used again"
    assert stats.slot_loads > len(stats.slots) or len(stats.slots) >= len(model.adapters), "and slots"
    for one, output in zip(asked, outputs, strict=True) if alone else ():
        assert (await answer(*one)).logprobs == output.logprobs, "bits that depend on the batch"
    engine.check_invariants()
