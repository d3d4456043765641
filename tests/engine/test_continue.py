"""A request whose first tokens were delivered elsewhere goes on as if they had been generated here."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.engine_fixtures import MakeEngine, Tiny, greedy, prompt_of

from aioengine import AsyncEngine, RequestOutput, SamplingParams
from aioengine.errors import RequestInvalid
from aioengine.guided import Guide
from aioengine.request import TokenConstraint
from aioengine.runtime.requests.continuation import Replayed

CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"temperature": 1.0, "top_p": 0.9, "seed": 7},
    "penalties": {
        "temperature": 0.8,
        "top_k": 20,
        "seed": 3,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.2,
    },
    "min tokens": {"temperature": 1.0, "seed": 5, "min_tokens": 20, "ignore_eos": False},
    "logprobs": {"temperature": 0.7, "seed": 1, "top_p": 0.95, "logprobs": 3},
}


async def outputs_of(
    engine: AsyncEngine, prompt: Any, params: SamplingParams, **options: Any
) -> list[RequestOutput]:
    return [output async for output in engine.generate(prompt, params, **options)]


@pytest.mark.parametrize("replay", [False, True], ids=["at once", "replayed"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
async def test_every_cut_is_exact(case: str, replay: bool, tiny_text: Tiny, make_engine: MakeEngine) -> None:
    params = SamplingParams(**{"max_tokens": 24, "ignore_eos": True, **CASES[case]})
    prompt = prompt_of(1, 21)
    async with make_engine(tiny_text) as first, make_engine(tiny_text) as second:
        for engine in (first, second):
            engine.register_adapter("a", tiny_text.adapters["a"])
        whole = await outputs_of(first, prompt, params, adapter="a")
        for cut in (1, 7, 16, 23):
            delivered = whole[cut - 1]
            assert len(delivered.token_ids) == cut, "one token at a time"
            rest = await outputs_of(
                second, prompt, params, adapter="a", output=delivered.token_ids, replay=replay
            )
            assert rest[0].token_ids[:cut] == delivered.token_ids
            assert delivered.token_ids + [t for o in rest for t in o.token_ids_delta] == whole[-1].token_ids
            assert delivered.text + "".join(o.text_delta for o in rest) == whole[-1].text == rest[-1].text
            assert rest[-1].finish_reason == whole[-1].finish_reason
            assert rest[-1].prompt_token_ids == prompt
            if params.logprobs is not None:
                assert rest[-1].logprobs is not None and whole[-1].logprobs is not None
                for again, before in zip(rest[-1].logprobs, whole[-1].logprobs, strict=True):
                    assert again.token_id == before.token_id
                    assert again.logprob == pytest.approx(before.logprob, abs=1e-5)
                assert all(len(o.logprobs_delta) == len(o.token_ids_delta) for o in rest)
        second.check_invariants()


Make = Callable[[AsyncEngine], Awaitable[TokenConstraint]]


class Letters:
    """A constraint of the caller's own: "ab" in turns, by what has been generated."""

    def allowed(self, output: Any) -> bytes:
        mask = bytearray(32)
        token = 66 + len(output) % 2
        mask[token // 8] = 1 << token % 8
        return bytes(mask)


class Ascii:
    """Printable characters alone, of which each is one token."""

    def allowed(self, output: Any) -> bytes:
        return b"\xff" * 11


async def letters(engine: AsyncEngine) -> TokenConstraint:
    return Letters()


async def regex(engine: AsyncEngine) -> TokenConstraint:
    return await Guide(engine).regex("[a-f]{12}(xy|z)[0-9]{6}")


@pytest.mark.parametrize("replay", [False, True], ids=["at once", "replayed"])
@pytest.mark.parametrize("make", [letters, regex])
@pytest.mark.slow
async def test_constraints_go_on(make: Make, replay: bool, tiny_text: Tiny, make_engine: MakeEngine) -> None:
    async with make_engine(tiny_text) as first, make_engine(tiny_text) as second:
        params = [
            SamplingParams(max_tokens=24, temperature=1.0, seed=2, constraint=await make(engine))
            for engine in (first, second)
        ]
        whole = await first.complete("Say", params[0])
        for cut in (5, 13):
            rest = await second.complete("Say", params[1], output=whole.token_ids[:cut], replay=replay)
            assert (rest.token_ids, rest.text) == (whole.token_ids, whole.text)
            assert rest.finish_reason == whole.finish_reason


class Counting(Letters):
    """Knows the next tokens; is late for some."""

    slow = False
    forced: Sequence[int] = ()

    def begin(self, output: Sequence[int]) -> None:
        pass

    def poll(self, output: Sequence[int], seconds: float) -> bytes | None:
        if len(output) % 3 == 0:
            return None
        self.forced = [len(output) + 1, len(output) + 2]
        return self.allowed(output)


@given(replay=st.integers(1, 6), lengths=st.lists(st.integers(0, 12), min_size=1))
def test_nothing_is_forced_within_a_replay(replay: int, lengths: list[int]) -> None:
    """In whatever order a constraint is asked: a step may ask it beyond the replay (for proposed tokens), and
    the next one within it again."""
    constraint: Any = Replayed([1] * replay, Counting(), vocab=256)
    for length in lengths:
        mask = constraint.poll([1] * length, 0.0)
        if length < replay:
            assert (mask[0], list(constraint.forced)) == (2, [])
        elif mask is not None:
            assert list(constraint.forced) == [length + 1, length + 2]


@pytest.mark.parametrize("replay", [False, True], ids=["at once", "replayed"])
@pytest.mark.slow
async def test_stop_strings_over_the_cut(replay: bool, tiny_text: Tiny, make_engine: MakeEngine) -> None:
    async with make_engine(tiny_text) as engine:
        ascii_only: dict[str, Any] = {"max_tokens": 30, "temperature": 1.0, "seed": 4, "constraint": Ascii()}
        free = await engine.complete("Hello", SamplingParams(**ascii_only))
        stop = free.text[14:17]
        params = SamplingParams(**ascii_only, stop=[stop])
        whole = await outputs_of(engine, "Hello", params)
        assert whole[-1].stop_reason == stop
        for cut in range(1, len(whole)):
            rest = await outputs_of(engine, "Hello", params, output=whole[cut - 1].token_ids, replay=replay)
            assert rest[-1].stop_reason == stop
            assert whole[cut - 1].text + "".join(o.text_delta for o in rest) == whole[-1].text


@pytest.mark.parametrize("replay", [False, True], ids=["at once", "replayed"])
async def test_a_complete_output_ends_at_once(replay: bool, tiny_text: Tiny, make_engine: MakeEngine) -> None:
    async with make_engine(tiny_text) as engine:
        whole = await engine.complete("Hello", greedy(9))
        rest = await outputs_of(engine, "Hello", greedy(9), output=whole.token_ids, replay=replay)
        assert [o.token_ids_delta for o in rest] == [[]]
        assert (rest[0].finish_reason, rest[0].text) == ("length", whole.text)
        stopped = SamplingParams(max_tokens=20, stop_token_ids=[whole.token_ids[4]])
        at = whole.token_ids.index(whole.token_ids[4]) + 1
        rest = await outputs_of(engine, "Hello", stopped, output=whole.token_ids[:at], replay=replay)
        assert (rest[-1].finish_reason, rest[-1].stop_reason) == ("stop", whole.token_ids[4])
        engine.check_invariants()


async def test_what_was_not_made_here_is_not_counted(tiny: Tiny, make_engine: MakeEngine) -> None:
    async with make_engine(tiny) as engine:
        whole = await engine.complete(prompt_of(0, 9), greedy(12))
        before = engine.stats().output_tokens
        await engine.complete(prompt_of(0, 9), greedy(12), output=whole.token_ids[:8])
        assert engine.stats().output_tokens - before == 4


@pytest.mark.parametrize(
    ("output", "params", "match"),
    [
        ([1] * 9, {"max_tokens": 8}, "9 tokens, more than max_tokens=8"),
        ([1] * 100, {"max_tokens": 200}, "more than max_model_len=128"),
        ([300], {}, "token 300 is outside the vocabulary"),
        ([-1], {}, r"output.0.=-1"),
        (["a"], {}, r"output.0.='a'"),
        ("text", {}, "output='text': must be a list"),
        (numpy.array([5, 6]), {}, "must be a list"),
    ],
)
async def test_an_output_that_cannot_be(
    output: Any, params: dict[str, Any], match: str, tiny_text: Tiny, make_engine: MakeEngine
) -> None:
    async with make_engine(tiny_text) as engine:
        with pytest.raises(RequestInvalid, match=match):
            await engine.complete(prompt_of(0, 30), SamplingParams(**params), output=output)
        with pytest.raises(RequestInvalid, match="replay='yes'"):
            await engine.complete([1], output=[1], replay="yes")  # type: ignore[arg-type]
