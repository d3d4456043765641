"""Bad input gets the typed error that says what, where and what to do, and harms nobody else."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from support.engine_fixtures import MakeEngine, Tiny, greedy
from support.failure_harness import under_load

from aioengine import SamplingParams
from aioengine.errors import AdapterNotFound, AioEngineError, RequestInvalid


async def test_bad_prompts(tiny: Tiny, make_engine: MakeEngine) -> None:
    prompts: list[tuple[Any, str]] = [
        ([], "empty"),
        ([5] * 128, "max_model_len=128"),
        ([5, 256], "256 is outside the vocabulary"),
        ([-1], "-1 is outside"),
        ("text", "no tokenizer.json"),
        ([{"role": "user", "content": "x"}], "no tokenizer.json"),
        (5, "must be str"),
        ([1.5], "no tokenizer.json"),
        (None, "must be str"),
    ]
    async with make_engine(tiny) as engine, under_load(engine, tiny):
        for prompt, message in prompts:
            with pytest.raises(RequestInvalid, match=message):
                await engine.complete(prompt, greedy())


async def test_no_token_beyond_the_vocabulary_gets_into_a_step(
    tiny_text: Tiny, make_engine: MakeEngine, tmp_path: Path
) -> None:
    """Nothing looks there: the compiled step reads embeddings wherever a token says. A tokenizer may have
    more tokens than the model."""
    model = Path(shutil.copytree(tiny_text.model, tmp_path / "model"))
    more = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    assert more.add_tokens(["far"]) == 1
    more.save(str(model / "tokenizer.json"))
    chat: Any = [{"role": "user", "content": "far"}]
    async with make_engine(tiny_text._replace(model=model)) as engine:
        for prompt in ("how far", chat, [1, 256], [1, -1]):
            with pytest.raises(RequestInvalid, match="outside the vocabulary"):
                await engine.complete(prompt, greedy(2))
            with pytest.raises(RequestInvalid, match="outside the vocabulary"):
                await engine.embed(prompt)
        for token in (256, -1):
            with pytest.raises(RequestInvalid, match=r"outside the vocabulary|must be >= 0"):
                await engine.complete([1], greedy(4), output=[2, token])
        with pytest.raises(RequestInvalid, match="outside the vocabulary"):
            await engine.score("near", ["far"])
        forced = Forced([5, 256])
        with pytest.raises(AioEngineError, match="not all token ids below 256"):
            await engine.complete([1], SamplingParams(constraint=forced))
        assert len((await engine.complete("near", greedy(2))).token_ids) == 2


class Forced:
    """A constraint that allows its first token, and says that the others have to follow."""

    slow = False

    def __init__(self, tokens: list[int]) -> None:
        first, *self.forced = tokens
        self._mask = bytearray(32)
        self._mask[first // 8] = 1 << first % 8

    def begin(self, output: Sequence[int]) -> None:
        pass

    def poll(self, output: Sequence[int], timeout: float) -> bytes:
        return bytes(self._mask)

    def allowed(self, output: Sequence[int]) -> bytes:
        return bytes(self._mask)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_k", -1),
        ("repetition_penalty", 0.0),
        ("frequency_penalty", -3.0),
        ("logprobs", 21),
        ("stop", [""]),
        ("stop_token_ids", [-1]),
        ("seed", "x"),
    ],
)
def test_bad_sampling_values(field: str, value: Any) -> None:
    with pytest.raises(RequestInvalid, match=field):
        SamplingParams(**{field: value})


async def test_bad_request_arguments(tiny: Tiny, make_engine: MakeEngine) -> None:
    async with make_engine(tiny) as engine, under_load(engine, tiny):
        with pytest.raises(AdapterNotFound, match=r"'goood'.*known: good"):
            await engine.complete([1], adapter="goood")
        with pytest.raises(RequestInvalid, match="deadline"):
            await engine.complete([1], deadline=-1.0)
        with pytest.raises(RequestInvalid, match="SamplingParams"):
            await engine.complete([1], {"max_tokens": 3})  # type: ignore[arg-type]
        with pytest.raises(RequestInvalid, match="stop"):
            await engine.complete([1], SamplingParams(stop="x"))
        bad = {"request_id": 5, "priority": "x", "tenant": [], "deadline": "x", "adapter": []}
        for field, value in bad.items():
            with pytest.raises(RequestInvalid, match=field):
                await engine.complete([1], **{field: value})
        first = engine.generate([1], greedy(100), request_id="same")
        await anext(first)
        with pytest.raises(RequestInvalid, match="'same' is in use"):
            await engine.complete([1], request_id="same")
        await first.aclose()
