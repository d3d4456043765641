"""Log-probabilities of prompts against transformers + peft in float32, and ``min_tokens``."""

from __future__ import annotations

import asyncio
import functools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engine_fixtures import ADAPTERS, MakeEngine, Tiny, greedy, prompt_of, register
from support.tiny_models import ALL_MODULES, build_adapter, reference_logits

from aioengine import AsyncEngine, RequestOutput, SamplingParams
from aioengine.errors import RequestInvalid
from aioengine.model import runner
from aioengine.model.sampler import token_logprobs

pytestmark = pytest.mark.usefixtures("preloaded_workers")

PATHS: dict[str, dict[str, Any]] = {
    "torch": {},
    "compiled": {"block_size": 16},
    "chunks": {"max_num_batched_tokens": 16, "max_num_seqs": 8},
    "compiled chunks": {"max_num_batched_tokens": 16, "max_num_seqs": 8, "block_size": 16},
    "preempted": {"max_model_len": 64, "max_num_seqs": 6, "kv_cache_memory": 72 * 768},
    "process": {"executor": "process", "max_num_batched_tokens": 16, "max_num_seqs": 8},
    "ranks": {"executor": "process", "tensor_parallel_size": 2},
}
LENGTHS = (29, 5, 33, 1, 13, 26, 2, 30, 20, 31)
ONLY_PROMPT = SamplingParams(max_tokens=0, prompt_logprobs=3)


@functools.cache
def expected(model: Path, prompt: tuple[int, ...], adapter: Path | None) -> torch.Tensor:
    """[T, vocab] log-probabilities of what follows each token."""
    return reference_logits(model, prompt, adapter).float().log_softmax(-1)


def check(output: RequestOutput, tiny: Tiny, prompt: Sequence[int], name: str | None, top: int = 3) -> None:
    entries = output.prompt_logprobs
    assert entries is not None and len(entries) == len(prompt) and entries[0] is None
    table = expected(tiny.model, tuple(prompt), name and tiny.adapters[name])
    for row, token, entry in zip(table, prompt[1:], entries[1:], strict=False):
        assert entry is not None and entry.token_id == token
        assert entry.logprob == pytest.approx(row[token].item(), abs=1e-3)
        best = row.topk(top)
        assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-3)
        assert all(row[t].item() == pytest.approx(value, abs=1e-3) for t, value in entry.top)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.slow
async def test_values_are_those_of_transformers_and_peft(
    path: str, tiny: Tiny, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "executor" in PATHS[path] and sys.platform == "win32":
        pytest.skip("needs POSIX")
    monkeypatch.setattr(runner, "PIECE_BYTES", 7 * 4 * 256)  # pieces that end in the middle of prompts
    names = [None, *ADAPTERS]
    work = [(prompt_of(i, n), name) for i, (n, name) in enumerate(zip(LENGTHS, names, strict=True))]
    both = SamplingParams(max_tokens=20, prompt_logprobs=3, logprobs=2, ignore_eos=True)
    async with make_engine(tiny, **PATHS[path]) as engine:
        register(engine, tiny)
        for params in (ONLY_PROMPT, both, ONLY_PROMPT):  # the later ones find the prefix cache filled
            runs = [engine.complete(prompt, params, adapter=name) for prompt, name in work]
            plain = engine.complete(prompt_of(0, 29), greedy(12), adapter="rank-3")
            *outputs, beside = await asyncio.gather(*runs, plain)
            assert beside.token_ids == tiny.expected(prompt_of(0, 29), 12, "rank-3")
            for (prompt, name), output in zip(work, outputs, strict=True):
                check(output, tiny, prompt, name)
                assert output.finish_reason == "length" and len(output.token_ids) == params.max_tokens
                if params is both:
                    assert output.token_ids == tiny.expected(prompt, 20, name)
                    assert output.logprobs is not None and len(output.logprobs) == 20
        stats = engine.stats()
        engine.check_invariants()
    assert (stats.preemptions > 0) == (path == "preempted")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("block_size", [4, 16])
async def test_adapters_of_the_head_and_of_the_embedding(
    block_size: int, tiny: Tiny, make_engine: MakeEngine, tmp_path: Path
) -> None:
    modules = [*ALL_MODULES, "lm_head", "embed_tokens"]
    folder = build_adapter(tiny.model, tmp_path / "outer", r=6, target_modules=modules, use_dora=True)
    tiny = tiny._replace(adapters={"outer": folder})
    async with make_engine(tiny, target_modules=modules, block_size=block_size) as engine:
        engine.register_adapter("outer", folder)
        for seed, length in enumerate((9, 30)):
            prompt = prompt_of(seed, length)
            check(await engine.complete(prompt, ONLY_PROMPT, adapter="outer"), tiny, prompt, "outer")
            check(await engine.complete(prompt, ONLY_PROMPT), tiny, prompt, None)


async def test_a_prompt_alone_may_fill_the_context(tiny: Tiny, make_engine: MakeEngine) -> None:
    prompt = prompt_of(0, 64)
    async with make_engine(tiny, max_model_len=64) as engine:
        output = await engine.complete(prompt, ONLY_PROMPT)
        check(output, tiny, prompt, None)
        assert output.ttft is None and output.text == ""
        with pytest.raises(RequestInvalid, match="64 tokens"):
            await engine.complete(prompt, greedy(1))
        with pytest.raises(RequestInvalid, match="65 tokens"):
            await engine.complete([*prompt, 3], ONLY_PROMPT)


def test_what_cannot_be_asked_for() -> None:
    for fields in ({"max_tokens": 0}, {"prompt_logprobs": 21}, {"min_tokens": -1}):
        with pytest.raises(RequestInvalid, match=next(iter(fields))):
            SamplingParams(**fields)
    with pytest.raises(RequestInvalid, match="min_tokens=5"):
        SamplingParams(max_tokens=4, min_tokens=5)


def test_logits_that_are_not_finite() -> None:
    logits = torch.tensor([[0.0, -math.inf, 1.0], [0.0, math.nan, 1.0]])
    first, second = token_logprobs(logits, [1, 0], 2)
    assert first.logprob == -math.inf and first.top[0][0] == 2
    assert math.isnan(second.logprob)


# min_tokens


async def ends_of(engine: AsyncEngine, prompt: list[int]) -> int:
    """A token that a greedy answer to ``prompt`` has early, and not at its beginning."""
    tokens = (await engine.complete(prompt, greedy(20))).token_ids
    return next(token for place, token in enumerate(tokens) if place > 1 and tokens.index(token) == place)


@pytest.mark.parametrize("executor", ["thread", "process"])
@pytest.mark.slow
async def test_no_stop_token_comes_before_min_tokens(
    executor: str, tiny: Tiny, make_engine: MakeEngine
) -> None:
    prompt = prompt_of(4, 9)
    async with make_engine(tiny, executor=executor) as engine:
        stop = await ends_of(engine, prompt)
        plain = SamplingParams(max_tokens=30, stop_token_ids=[stop])
        soon = await engine.complete(prompt, plain)
        assert soon.finish_reason == "stop" and len(soon.token_ids) < 20
        for least in (len(soon.token_ids), 25, 30):
            params = SamplingParams(max_tokens=30, stop_token_ids=[stop], min_tokens=least)
            output = await engine.complete(prompt, params)
            assert len(output.token_ids) >= least
            assert stop not in output.token_ids[:least]


async def test_no_stop_string_is_looked_for_before_min_tokens(
    tiny_text: Tiny, make_engine: MakeEngine
) -> None:
    async with make_engine(tiny_text) as engine:
        whole = await engine.complete("Hello", greedy(40))
        stop = whole.text[4]
        early = await engine.complete("Hello", SamplingParams(max_tokens=40, stop=stop, ignore_eos=True))
        assert early.text == whole.text[: whole.text.index(stop)]
        kept = SamplingParams(max_tokens=40, stop=stop, ignore_eos=True, include_stop_str_in_output=True)
        assert (await engine.complete("Hello", kept)).text == early.text + stop
        late = SamplingParams(max_tokens=40, stop=stop, ignore_eos=True, min_tokens=12)
        output = await engine.complete("Hello", late)
        assert len(output.token_ids) > 12 and output.text == whole.text[: len(output.text)]


async def test_where_a_constraint_allows_only_the_end_it_comes(tiny: Tiny, make_engine: MakeEngine) -> None:
    class Two:
        def allowed(self, output: Sequence[int]) -> bytes:
            return b"\x80" if len(output) >= 2 else b"\x60"

    params = SamplingParams(max_tokens=9, min_tokens=6, stop_token_ids=[7, 6], constraint=Two())
    async with make_engine(tiny) as engine:
        assert (await engine.complete([5, 6], params)).token_ids == [5, 5, 7]
