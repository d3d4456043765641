"""Activated LoRA adapters (aLoRA): exact against PEFT, and the base model's blocks are theirs."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engine_fixtures import MakeEngine, Tiny, check_tokens, greedy, prompt_of, register
from support.peft_files import edit_config
from support.tiny_models import build_adapter, reference_logits

from aioengine import AsyncEngine, RequestOutput, SamplingParams
from aioengine.errors import AdapterInvalid

pytestmark = pytest.mark.usefixtures("preloaded_workers")

INVOCATION = [7, 9, 7]


@pytest.fixture(scope="module")
def activated(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Two activated adapters beside those of ``tiny``."""
    root = tmp_path_factory.mktemp("activated")
    made = {
        name: build_adapter(tiny.model, root / name, seed=seed, alora_invocation_tokens=INVOCATION, **more)
        for seed, (name, more) in enumerate({"check": {}, "judge": {"lora_bias": True}}.items())
    }
    return tiny._replace(adapters={**tiny.adapters, **made})


async def last(engine: AsyncEngine, prompt: list[int], adapter: str | None, **more: Any) -> RequestOutput:
    params = SamplingParams(max_tokens=12, ignore_eos=True, **more)
    return [output async for output in engine.generate(prompt, params, adapter=adapter)][-1]


PROMPTS = {
    "in a block": [*prompt_of(1, 21), *INVOCATION, 30, 31],
    "between two blocks": [*prompt_of(2, 24), *INVOCATION, 30],
    "at the end": [*prompt_of(3, 18), *INVOCATION],
    "at the beginning": [*INVOCATION, *prompt_of(4, 18)],
    "twice": [*prompt_of(5, 9), *INVOCATION, *prompt_of(6, 9), *INVOCATION, 40],
    "overlapping itself": [*prompt_of(7, 9), 7, 9, 7, 9, 7, 41],
    "nowhere": prompt_of(8, 25),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tokens", [16, 64])
@pytest.mark.slow
async def test_tokens_are_those_of_peft(tokens: int, activated: Tiny, make_engine: MakeEngine) -> None:
    """Mixed batches of base, plain and activated adapters, chunked prefill, two slots for three adapters."""
    who = (None, "rank-3", "check", "judge")
    async with make_engine(activated, max_num_batched_tokens=tokens) as engine:
        register(engine, activated, "rank-3", "check", "judge")
        cases = [(prompt, name) for prompt in PROMPTS.values() for name in who]
        outputs = await asyncio.gather(*(last(engine, prompt, name) for prompt, name in cases))
        differs = 0
        for (prompt, name), output in zip(cases, outputs, strict=True):
            assert output.token_ids == activated.expected(prompt, 12, name), (prompt, name)
            differs += output.token_ids != activated.expected(prompt, 12)
        assert differs > 10
    assert activated.expected(PROMPTS["nowhere"], 12, "check") == activated.expected(PROMPTS["nowhere"], 12)


@pytest.mark.slow
async def test_a_conversation_computes_its_beginning_once(activated: Tiny, make_engine: MakeEngine) -> None:
    """Base, check, another check, base again: nothing that stands before the invocation is computed again."""
    async with make_engine(activated) as engine:
        register(engine, activated, "check", "judge", "rank-3")
        chat = prompt_of(11, 40)
        answer = await last(engine, chat, None)
        chat = [*chat, *answer.token_ids]
        check = await last(engine, [*chat, *INVOCATION], "check")
        judge = await last(engine, [*chat, *INVOCATION], "judge")
        plain = await last(engine, [*chat, *INVOCATION], "rank-3")
        assert [o.cached_tokens for o in (check, judge, plain)] == [48, 52, 0]
        again = await last(engine, [*chat, 50, 51, 52, 53, 54], None)
        assert again.cached_tokens == 52, "the base model finds what the checks have computed"
        repeated = await last(engine, [*chat, *INVOCATION, *check.token_ids[:6]], "check")
        assert repeated.cached_tokens == 60, "its own blocks are found as well"
        other = await last(engine, [*chat, *INVOCATION, *check.token_ids[:6]], "judge")
        assert other.cached_tokens == 52, "and not another's"
        for output, name in ((check, "check"), (judge, "judge")):
            assert output.token_ids == activated.expected([*chat, *INVOCATION], 12, name)


async def test_a_request_goes_on_elsewhere(activated: Tiny, make_engine: MakeEngine) -> None:
    prompt = PROMPTS["in a block"]
    expected = activated.expected(prompt, 12, "check")
    async with make_engine(activated, speculation="ngram", block_size=16) as engine:
        register(engine, activated, "check")
        given = [*expected[:5]]
        outputs = [o async for o in engine.generate(prompt, greedy(12), adapter="check", output=given)]
        assert outputs[-1].token_ids == expected


async def test_prompt_logprobs(activated: Tiny, make_engine: MakeEngine) -> None:
    prompt = PROMPTS["in a block"]
    logprobs = reference_logits(activated.model, prompt, activated.adapters["check"]).log_softmax(-1)
    expected = logprobs[:-1].gather(1, torch.tensor(prompt[1:])[:, None]).flatten().tolist()
    async with make_engine(activated, max_num_batched_tokens=16) as engine:
        register(engine, activated, "check")
        output = await last(engine, prompt, "check", prompt_logprobs=0)
        assert output.prompt_logprobs is not None
        found = [entry.logprob for entry in output.prompt_logprobs if entry is not None]
        assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
async def test_another_process_learns_of_the_invocation(activated: Tiny, make_engine: MakeEngine) -> None:
    async with make_engine(activated, executor="process", tensor_parallel_size=2) as engine:
        register(engine, activated, "check")
        output = await last(engine, PROMPTS["twice"], "check")
        assert output.token_ids == activated.expected(PROMPTS["twice"], 12, "check")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"alora_invocation_tokens": "abc"}, "alora_invocation_tokens=.*array"),
        ({"alora_invocation_tokens": [1, -2]}, "alora_invocation_tokens=.*>= 0"),
        ({"alora_invocation_tokens": [True]}, "alora_invocation_tokens=.*int"),
        ({"alora_invocation_tokens": [3] * 257}, "alora_invocation_tokens=.*<= 256"),
        ({"use_dora": True, "lora_bias": False}, "use_dora"),
    ],
)
@pytest.mark.slow
async def test_refused(
    fields: dict[str, Any], words: str, activated: Tiny, make_engine: MakeEngine, tmp_path: Path
) -> None:
    folder = build_adapter(activated.model, tmp_path / "a", alora_invocation_tokens=INVOCATION)
    edit_config(folder, **fields)
    async with make_engine(activated) as engine:
        with pytest.raises(AdapterInvalid, match=words):
            await engine.load_adapter("a", folder)


async def test_it_is_scaled_and_not_mixed(activated: Tiny, make_engine: MakeEngine) -> None:
    async with make_engine(activated, max_lora_rank=32) as engine:
        register(engine, activated, "check", "rank-3")
        with pytest.raises(AdapterInvalid, match="invocation tokens"):
            await engine.complete(PROMPTS["twice"], greedy(2), adapter={"check": 0.5, "rank-3": 0.5})
        await check_tokens(engine, activated, [(PROMPTS["twice"], {"check": 0.5})], 8)
