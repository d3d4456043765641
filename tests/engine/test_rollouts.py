"""What reinforcement learning needs of its completions: log-probabilities that do not depend on what ran
beside them, and that scoring gives again."""

from __future__ import annotations

import asyncio
from typing import Any

import peft
import pytest
import torch
import transformers
from support.engine_fixtures import MakeEngine, Tiny, prompt_of
from support.tiny_models import ALL_MODULES

from aioengine import AsyncEngine, RequestOutput, SamplingParams

SCORING = SamplingParams(max_tokens=0, prompt_logprobs=0)
COMPANY = 6
"""Other requests beside a rollout, of the base model and of other adapters."""


def sampled(seed: int, max_tokens: int = 12) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=1.0, seed=seed, logprobs=0)


def values(output: RequestOutput) -> list[float]:
    assert output.logprobs is not None
    assert [entry.token_id for entry in output.logprobs] == list(output.token_ids)
    return [entry.logprob for entry in output.logprobs]


@pytest.fixture
def policy(tiny: Tiny) -> Any:
    """A PEFT model as a trainer has it."""
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float32)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=ALL_MODULES, init_lora_weights=False)
    torch.manual_seed(5)
    return peft.get_peft_model(base, config)


async def company(engine: AsyncEngine, seed: int) -> list[RequestOutput]:
    names = [None, "rank-3", "qv-only", None, "rank-3", "qv-only"]
    return await asyncio.gather(
        *(
            engine.complete(prompt_of(seed + i, 5 + 7 * i), sampled(seed + i, 20), adapter=names[i])
            for i in range(COMPANY)
        )
    )


async def test_scoring_later_gives_the_same_bits(tiny: Tiny, make_engine: MakeEngine, policy: Any) -> None:
    """In any company, and whether the prefix cache has the prompt; where the engine is batch-invariant."""
    prompt = prompt_of(1, 37)
    fields: dict[str, Any] = {"block_size": 16, "max_loras": 3, "max_cpu_loras": 4, "batch_invariant": True}
    found = []
    for chunk in (2048, 16):
        async with make_engine(tiny, max_num_batched_tokens=chunk, **fields) as engine:
            for name in ("rank-3", "qv-only"):
                engine.register_adapter(name, tiny.adapters[name])
            await engine.load_adapter_state("policy", policy)
            for beside in (False, True):
                rollout = engine.complete(prompt, sampled(7), adapter="policy")
                output, *_ = await asyncio.gather(rollout, *([company(engine, 60)] if beside else []))
                found.append((list(output.token_ids), values(output)))
                scoring = engine.complete([*prompt, *output.token_ids], SCORING, adapter="policy")
                scored, *_ = await asyncio.gather(scoring, *([company(engine, 80)] if beside else []))
                assert scored.prompt_logprobs is not None
                ends = [entry.logprob for entry in scored.prompt_logprobs[len(prompt) :] if entry is not None]
                assert ends == values(output), "not approximately: bit for bit"
    assert all(one == found[0] for one in found)
