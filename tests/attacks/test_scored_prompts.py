"""Log-probabilities and vectors, as many as a request may ask for: nobody else waits for them."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from support.bystander import bystander
from support.engine_fixtures import Tiny
from support.server_process import serving

from aioengine.server.answer import MAX_SCORES

pytestmark = pytest.mark.slow

LENGTH, TOP = 490, 20
MOST = MAX_SCORES // (LENGTH * (TOP + 1))
"""Prompts of that length in one request."""
ONE_FORM = {"prompt_logprobs": None}


async def test_large_answers_hold_up_nobody(tiny_text: Tiny) -> None:
    body = {
        "model": "tiny",
        "prompt": [[index % 250 + 1] * LENGTH for index in range(MOST)],
        "logprobs": TOP,
        "prompt_logprobs": TOP,
        "echo": True,
        "max_tokens": 0,
    }
    async with (
        serving(tiny_text.model, "--served-model-name", "tiny") as server,
        httpx.AsyncClient(base_url=server.url, timeout=120, trust_env=False) as client,
    ):
        await client.post("/v1/completions", json={**body, "prompt": body["prompt"][:1]})
        async with bystander(server.url) as seen:
            answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(2)))
            streamed = await client.post("/v1/completions", json={**body, "stream": True} | ONE_FORM)
        for answer in answers:
            assert answer.status_code == 200, answer.text[:300]
            assert all(len(choice["logprobs"]["tokens"]) == LENGTH for choice in answer.json()["choices"])
        assert streamed.status_code == 200 and streamed.text.count("text_offset") == MOST
        seen.check()
        more = {**body, "prompt": [*body["prompt"], *body["prompt"]]}
        refused = await client.post("/v1/completions", json=more)
        assert refused.status_code == 400 and str(MAX_SCORES) in refused.json()["error"]["message"]
