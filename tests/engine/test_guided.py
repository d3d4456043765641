"""Guided decoding in an application's own hands."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from support.byte_tokenizer import byte_tokenizer
from support.engine_fixtures import MakeEngine, Tiny, greedy
from support.tiny_models import build_model

from aioengine import SamplingParams
from aioengine.errors import ConfigError
from aioengine.guided import Guide

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"enum": [1, 22, 333]}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


def sampled(**fields: Any) -> SamplingParams:
    return SamplingParams(max_tokens=350, temperature=1.0, **fields)


async def test_each_request_has_its_own_format(tiny_text: Tiny, make_engine: MakeEngine) -> None:
    """... in one batch with requests that have none, with an adapter and without."""
    async with make_engine(tiny_text, max_model_len=400) as engine:
        engine.register_adapter("a", tiny_text.adapters["a"])
        guide = Guide(engine)
        free = await engine.complete("free", greedy(20))
        schema = [sampled(seed=i, constraint=await guide.json_schema(SCHEMA)) for i in range(3)]
        regex = sampled(seed=1, constraint=await guide.regex("x{3,5}y"))
        *objects, pattern, again = await asyncio.gather(
            *[engine.complete("Hi", params, adapter="a") for params in schema],
            engine.complete("Hi", regex),
            engine.complete("free", greedy(20)),
        )
        for output in objects:
            assert output.finish_reason == "stop"
            assert set(json.loads(output.text)) == {"a", "b"}
        assert pattern.text in ("xxxy", "xxxxy", "xxxxxy")
        assert again.text == free.text


@pytest.fixture(scope="module")
def tiny_marks(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A tiny llama whose tokenizer has added tokens beside one for each byte."""
    model = build_model(tmp_path_factory.mktemp("marks"), "llama", vocab_size=260, eos_token_id=259)
    byte_tokenizer([THINK, "</think>"], [TURN, "<|end|>"]).save(str(model / "tokenizer.json"))
    return Tiny(model, {})


THINK, TURN = "<think>", "<|turn|>"
MARKED: list[tuple[str, Any, Sequence[str]]] = [
    ("choice", [THINK], [THINK]),
    ("choice", [f"{THINK}a", f"{THINK}b", TURN], [f"{THINK}a", f"{THINK}b", TURN]),
    ("choice", [f"x{TURN}y", f"x{TURN}z"], [f"x{TURN}y", f"x{TURN}z"]),
    ("regex", "<think>[ab]</think>", [f"{THINK}a</think>", f"{THINK}b</think>"]),
    ("json_schema", {"const": f"a{THINK}{TURN}"}, [json.dumps(f"a{THINK}{TURN}")]),
    ("json_schema", {"enum": [THINK, TURN]}, [json.dumps(THINK), json.dumps(TURN)]),
    (
        "json_schema",
        {"properties": {THINK: {"const": 1}}, "required": [THINK], "type": "object"},
        [json.dumps({THINK: 1})],
    ),
]


@pytest.mark.parametrize(("kind", "wanted", "allowed"), MARKED)
@pytest.mark.slow
async def test_texts_that_are_tokens_of_their_own(
    tiny_marks: Tiny, make_engine: MakeEngine, kind: str, wanted: Any, allowed: Sequence[str]
) -> None:
    async with make_engine(tiny_marks) as engine:
        constraint = [await getattr(Guide(engine), kind)(wanted) for _ in range(2)]
        outputs = await asyncio.gather(
            *(engine.complete("Hi", sampled(seed=i, constraint=own)) for i, own in enumerate(constraint))
        )
        for output in outputs:
            assert (output.finish_reason, output.text in allowed) == ("stop", True), output


class Digits:
    """Digits only. Its answers are late for every second and third output, twice and once."""

    def __init__(self, *, late: bool) -> None:
        self._mask = sum(1 << ord(c) for c in "0123456789").to_bytes(32, "little")
        self._late = late
        self._asked: Counter[int] = Counter()
        self.slow = False

    def allowed(self, output: Sequence[int]) -> bytes:
        return self._mask

    def begin(self, output: Sequence[int]) -> None:
        pass

    def poll(self, output: Sequence[int], seconds: float) -> bytes | None:
        self._asked[len(output)] += 1
        is_late = self._late and self._asked[len(output)] <= len(output) % 3
        return None if is_late else self._mask


@pytest.mark.usefixtures("preloaded_workers")
@pytest.mark.parametrize("executor", ["thread", "process"])
@pytest.mark.slow
async def test_late_masks_change_no_token(executor: str, tiny_text: Tiny, make_engine: MakeEngine) -> None:
    """... neither the request's own nor others', across blocks, chunks of prompts and preemptions."""
    fields: dict[str, Any] = {
        "executor": executor,
        "kv_cache_memory": "64KiB",
        "max_model_len": 64,
        "max_num_batched_tokens": 16,
    }

    async def run(*, late: bool) -> list[list[int]]:
        async with make_engine(tiny_text, **fields) as engine:
            outputs = await asyncio.gather(
                *[
                    engine.complete(
                        f"a prompt that is one of {i}",
                        SamplingParams(max_tokens=25, seed=i, constraint=constraint, temperature=i % 2),
                    )
                    for i in range(6)
                    for constraint in (Digits(late=late) if i < 4 else None,)
                ]
            )
            engine.check_invariants()
            return [output.token_ids for output in outputs]

    found = await run(late=True)
    assert found == await run(late=False)
    assert all(chr(token).isdigit() for tokens in found[:4] for token in tokens)


async def test_without_a_tokenizer_there_is_no_guide(tiny: Tiny, make_engine: MakeEngine) -> None:
    async with make_engine(tiny) as engine:
        with pytest.raises(ConfigError, match="tokenizer"):
            Guide(engine)


async def test_what_compiles_grammars_writes_nothing_to_the_standard_streams(
    tiny_text: Tiny,
    make_engine: MakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PYTHONVERBOSE", "1")
    async with make_engine(tiny_text) as engine:
        assert (await Guide(engine).regex("a+")).allowed([])
    assert "import '" not in capfd.readouterr().err
