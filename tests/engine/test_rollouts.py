"""What reinforcement learning needs of its completions: log-probabilities that are the trainer's, that do not
depend on what ran beside them, and an adapter that is the trainer's after each of its steps."""

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


def trainer_values(model: Any, prompt: list[int], completion: list[int]) -> list[float]:
    """The log-probabilities that a trainer computes of the same tokens, with gradients on."""
    logits = model(torch.tensor([prompt + completion]), use_cache=False).logits[0]
    table = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    found: list[float] = table.gather(1, torch.tensor(completion)[:, None])[:, 0].tolist()
    return found


def step(model: Any, prompt: list[int], completion: list[int]) -> None:
    """A step of a policy gradient."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    logits = model(torch.tensor([prompt + completion]), use_cache=False).logits[0]
    table = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    loss: Any = -table.gather(1, torch.tensor(completion)[:, None]).mean()
    loss.backward()
    optimizer.step()


async def company(engine: AsyncEngine, seed: int) -> list[RequestOutput]:
    names = [None, "rank-3", "qv-only", None, "rank-3", "qv-only"]
    return await asyncio.gather(
        *(
            engine.complete(prompt_of(seed + i, 5 + 7 * i), sampled(seed + i, 20), adapter=names[i])
            for i in range(COMPANY)
        )
    )


@pytest.mark.parametrize("block_size", [4, 16], ids=["torch", "compiled"])
@pytest.mark.slow
async def test_each_step_is_sampled_from_the_trained_adapter(
    block_size: int, tiny: Tiny, make_engine: MakeEngine, policy: Any
) -> None:
    async with make_engine(tiny, block_size=block_size, max_loras=3, max_cpu_loras=4) as engine:
        for name in ("rank-3", "qv-only"):
            engine.register_adapter(name, tiny.adapters[name])
        earlier: list[list[int]] = []
        for turn in range(3):
            await engine.load_adapter_state("policy", policy)
            prompts = [prompt_of(i, 9 + 4 * i) for i in range(4)]
            runs = [engine.complete(p, sampled(i), adapter="policy") for i, p in enumerate(prompts)]
            outputs, _ = await asyncio.gather(asyncio.gather(*runs), company(engine, 40))
            for prompt, output in zip(prompts, outputs, strict=True):
                theirs = trainer_values(policy, prompt, list(output.token_ids))
                assert values(output) == pytest.approx(theirs, abs=1e-4), turn
            tokens = [token for output in outputs for token in output.token_ids]
            assert tokens not in earlier, "the adapter has changed, and so do its completions"
            earlier.append(tokens)
            step(policy, prompts[0], list(outputs[0].token_ids))


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
