"""Sampling defaults out of generation_config.json."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.engine_fixtures import MakeEngine, Tiny
from support.server_fixtures import MODEL, Served, served_by

from aioengine import SamplingParams
from aioengine.errors import ConfigError
from aioengine.server.openai.api import (
    GenerationFields,
    SamplingDefaults,
    read_sampling_defaults,
    sampling_params,
)

PROMPT = "Hello, who"


def model_with(tiny: Tiny, folder: Path, **values: Any) -> Tiny:
    """The same model with ``values`` in its file."""
    model = shutil.copytree(tiny.model, folder / "model")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": 255, **values}))
    return Tiny(model, tiny.adapters)


async def ask(served: Served, **fields: Any) -> tuple[str, int]:
    body = {"model": MODEL, "prompt": PROMPT, "ignore_eos": True, **fields}
    answer = (await served.http.post("/v1/completions", json=body)).json()
    return answer["choices"][0]["text"], answer["usage"]["completion_tokens"]


@pytest.mark.slow
async def test_the_models_defaults_and_what_wins_over_them(
    tiny_text: Tiny, make_engine: MakeEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aioengine.server")
    tiny = model_with(tiny_text, tmp_path, temperature=0.7, top_k=1, max_new_tokens=5, do_sample=False)
    async with make_engine(tiny) as engine:

        async def direct(**params: Any) -> str:
            return (await engine.complete(PROMPT, SamplingParams(ignore_eos=True, **params))).text

        async with served_by(engine) as served:
            greedy = await direct(temperature=0, max_tokens=5)
            assert await ask(served) == (greedy, 5), "top_k=1 leaves nothing to chance; 5 of the default 16"
            chat = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "ignore_eos": True}
            answer = (await served.http.post("/v1/chat/completions", json=chat)).json()
            assert answer["usage"]["completion_tokens"] == 5
            answer = (await served.http.post("/v1/chat/completions", json={**chat, "max_tokens": 9})).json()
            assert answer["usage"]["completion_tokens"] == 9
            text, count = await ask(served, top_k=0, seed=7, max_tokens=12)
            assert (text, count) == (await direct(temperature=0.7, seed=7, max_tokens=12), 12)
        lines = [r.getMessage() for r in caplog.records if "generation_config" in r.getMessage()]
        assert lines == [
            "defaults of requests, from generation_config.json: temperature=0.7 top_k=1 max_new_tokens=5"
        ]
        async with served_by(engine, settings={"generation_config": "none"}) as served:
            assert await ask(served, seed=7) == (await direct(temperature=1, seed=7, max_tokens=16), 16)


bounds = {
    "temperature": st.floats(0, 2),
    "top_k": st.integers(0, 1000),
    "top_p": st.floats(0.01, 1),
    "min_p": st.floats(0, 1),
    "repetition_penalty": st.floats(0.1, 10),
}


@given(st.fixed_dictionaries({}, optional=bounds), st.fixed_dictionaries({}, optional=bounds))
def test_a_field_of_the_request_wins_whatever_both_are(
    defaults: dict[str, float], fields: dict[str, float]
) -> None:
    params = sampling_params(
        GenerationFields(model="m", **fields),  # type: ignore[arg-type]
        SamplingDefaults(**defaults),  # type: ignore[arg-type]
        max_tokens=3,
        logprobs=None,
    )
    neutral = SamplingParams(temperature=1.0)
    for name in bounds:
        wanted = fields.get(name, defaults.get(name, getattr(neutral, name)))
        assert getattr(params, name) == wanted


@pytest.mark.parametrize(
    "text", ["{", '{"temperature": 3}', '{"top_p": "0.9"}', '{"max_new_tokens": 0}', "[]"]
)
def test_what_cannot_be_is_said(text: str, tmp_path: Path) -> None:
    file = tmp_path / "generation_config.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match="generation_config"):
        read_sampling_defaults(tmp_path)
    assert read_sampling_defaults(tmp_path / "nothing") == SamplingDefaults()
