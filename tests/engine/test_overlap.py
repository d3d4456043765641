"""Steps that overlap: the loop in virtual time, and whole engines, whose tokens stay the same."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from support.core_sim import LIMITS
from support.engine_fixtures import ADAPTERS, MakeEngine, Tiny, prompt_of
from support.overlapping_device import Overlapping

from aioengine import AsyncEngine, EngineConfig, SamplingParams
from aioengine.core import Core
from aioengine.errors import ConfigError
from aioengine.kernels.cpu import build
from aioengine.lab.simulation.clock import VirtualTimeLoop
from aioengine.model.runner import ModelRunner
from aioengine.request import RequestOptions
from aioengine.runtime.loop import Stepper
from aioengine.schedulers.policies.fcfs import FCFS
from aioengine.step import StepBatch, StepResult


def run(main: Callable[[Stepper, Overlapping], Awaitable[None]], *, overlap: bool = True) -> Overlapping:
    device = Overlapping()

    async def whole() -> None:
        stepper = Stepper(Core(LIMITS, FCFS()), device, overlap=overlap)
        stepper.start()
        await main(stepper, device)
        await stepper.stop()

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(whole())
    return device


def add(stepper: Stepper, request_id: str, max_tokens: int = 10) -> None:
    now = asyncio.get_running_loop().time()
    params = SamplingParams(max_tokens=max_tokens)
    stepper.core.add_request(request_id, [3, 4], params, RequestOptions(), now)
    stepper.wake()


@pytest.mark.parametrize("overlap", [True, False])
def test_the_next_step_waits_at_the_device(overlap: bool) -> None:
    async def main(stepper: Stepper, device: Overlapping) -> None:
        add(stepper, "r")
        await asyncio.sleep(0.045)
        assert device.last is not None
        assert (device.last.batch is not device.begun[-1]) == overlap
        await asyncio.sleep(1)
        assert not stepper.core.requests

    device = run(main, overlap=overlap)
    assert len(device.begun) == 10, "a token each"
    assert [batch.follows for batch in device.begun] == [False] + [overlap] * 9


def test_who_arrives_is_in_the_very_next_step() -> None:
    async def main(stepper: Stepper, device: Overlapping) -> None:
        add(stepper, "first", 40)
        await asyncio.sleep(0.105)
        begun = len(device.begun)
        add(stepper, "second")
        await asyncio.sleep(0.01)
        assert [work.request_id for work in device.begun[begun].sequences] == ["first", "second"]

    run(main)


def test_an_abort_leaves_the_others_alone() -> None:
    async def main(stepper: Stepper, device: Overlapping) -> None:
        add(stepper, "stays", 20)
        add(stepper, "goes", 20)
        await asyncio.sleep(0.065)
        request = stepper.core.requests["goes"]
        stepper.abort(request)
        stepper.core.check()
        await asyncio.sleep(0.01)
        assert not request.blocks
        await asyncio.sleep(1)
        assert not stepper.core.requests
        stepper.core.check()

    device = run(main)
    assert sum(len(batch.sequences) for batch in device.begun) == 20 + 7


def test_a_step_that_fails_takes_the_one_behind_it_along() -> None:
    async def main(stepper: Stepper, device: Overlapping) -> None:
        device.fails_at = 6
        add(stepper, "r", 20)
        dead = await stepper.until_dead()
        assert "the device is broken" in str(dead)
        stepper.core.check()

    run(main)


def test_stopping_leaves_no_step_behind() -> None:
    async def main(stepper: Stepper, device: Overlapping) -> None:
        add(stepper, "r", 50)
        await asyncio.sleep(0.083)

    device = run(main)
    assert device.last is not None and not device.last.began
    assert len(device.begun) == 9


KINDS = [
    SamplingParams(max_tokens=24, ignore_eos=True),
    SamplingParams(max_tokens=24, ignore_eos=True, temperature=1.0, seed=5, logprobs=2),
    SamplingParams(max_tokens=24, ignore_eos=True, temperature=0.7, seed=6, top_p=0.8, min_tokens=3),
    SamplingParams(max_tokens=24, ignore_eos=True, logit_bias={5: 2.0}),
    SamplingParams(max_tokens=9, ignore_eos=True, repetition_penalty=1.3),
    SamplingParams(max_tokens=30, stop_token_ids=tuple(range(3, 40))),
]


async def crowd(engine: AsyncEngine, seed: int) -> list[Any]:
    """The outputs of requests that come and go; some are given up."""
    rng = random.Random(seed)
    names = [rng.choice((None, *list(ADAPTERS)[:4])) for _ in range(30)]
    times = [rng.random() * 0.2 for _ in range(30)]

    async def one(i: int) -> Any:
        await asyncio.sleep(times[i])
        name = names[i]
        stream = engine.generate(prompt_of(i % 4, 3 + i), KINDS[i % len(KINDS)], adapter=name)
        seen = None
        async for seen in stream:
            if i % 7 == 6 and len(seen.token_ids) > 3:
                await stream.aclose()
                return "given up"
        assert seen is not None
        return seen.token_ids, seen.logprobs, seen.finish_reason

    return await asyncio.gather(*(one(i) for i in range(30)))


@pytest.mark.skipif(build.shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.slow
async def test_tokens_are_the_same(
    tiny: Tiny, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    followed = 0

    def execute(self: ModelRunner, batch: StepBatch) -> StepResult:
        nonlocal followed
        followed += batch.follows
        return plain(self, batch)

    plain = ModelRunner.execute
    monkeypatch.setattr(ModelRunner, "execute", execute)
    answers = []
    for overlap in (True, False):
        fields = {"dtype": "bfloat16", "block_size": 16, "batch_invariant": True, "max_cpu_loras": 4}
        async with make_engine(tiny, overlap=overlap, **fields) as engine:
            for name, folder in tiny.adapters.items():
                engine.register_adapter(name, folder)
            answers.append([await crowd(engine, seed) for seed in range(2)])
            alone = await engine.complete(prompt_of(0, 9), KINDS[1])
            answers[-1].append((alone.token_ids, alone.logprobs))
        assert (followed > 0) == overlap
        followed = 0
    assert answers[0] == answers[1]


async def test_a_stop_string_ends_it_where_it_is(tiny_text: Tiny, make_engine: MakeEngine) -> None:
    texts = []
    for overlap in (True, False):
        async with make_engine(tiny_text, overlap=overlap) as engine:
            whole = await engine.complete("abc", SamplingParams(max_tokens=40, ignore_eos=True))
            stop = whole.text[12:14]
            out = await engine.complete("abc", SamplingParams(max_tokens=40, ignore_eos=True, stop=(stop,)))
            texts.append((whole.text, out.text, out.token_ids, out.finish_reason))
    assert texts[0] == texts[1]
    assert texts[0][3] == "stop"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"overlap": "yes"}, "must be 'auto', True or False"),
        ({"overlap": True, "executor": "process"}, "executor='process' is given one step at a time"),
        ({"overlap": True, "speculation": "ngram"}, "speculation='ngram' needs the tokens"),
    ],
)
def test_where_it_cannot_be_had(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        EngineConfig(model="m", **fields)


def test_what_happens_while_a_step_is_taken_in_does_not_take_its_follower_back() -> None:
    async def main(stepper: Stepper, device: Overlapping) -> None:
        stepper.listen(lambda event: stepper.wake())
        add(stepper, "r", 20)
        await asyncio.sleep(1)
        assert not stepper.core.requests and stepper.dead is None
        stepper.core.check()

    assert len(run(main).begun) == 20
