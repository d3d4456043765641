"""What a real server's ``/metrics`` says of its answers, its tenants, its state and its limits."""

from __future__ import annotations

import re

import httpx
import openai
import pytest
from support.server_fixtures import MODEL, Serve

from aioengine.metrics.starting import starting_metrics


async def scrape(http: httpx.AsyncClient) -> dict[str, float]:
    """By name and labels, without the engine's."""
    text = (await http.get("/metrics")).text
    found = {}
    for name, labels, value in re.findall(r"^(\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        others = [pair for pair in re.findall(r'\w+="[^"]*"', labels) if not pair.startswith("engine=")]
        found[f"{name}{{{','.join(others)}}}"] = float(value)
    return found


async def test_an_error_within_a_stream_is_counted_as_one(serve: Serve) -> None:
    async with serve() as served:
        stream = await served.client.completions.create(
            model=MODEL, prompt="x", max_tokens=100, stream=True, extra_body={"ignore_eos": True}
        )
        await anext(aiter(stream))
        assert (await scrape(served.http))["aioengine_http_requests_active{}"] == 1
        await served.engine.stop()
        with pytest.raises(openai.APIError):
            async for _ in stream:
                pass
        text = served.engine.metrics.expose()[0].decode()
    assert re.search(
        r'http_responses_total\{code="unavailable",.*route="/v1/completions",status="503"\} 1', text
    )


async def test_tenants_beyond_the_bound_share_a_label(serve: Serve) -> None:
    keys = {f"sk-{i}": f"tenant-{i}" for i in range(5)}
    async with serve(settings={"api_keys": keys}, key="sk-0", max_adapter_labels=2) as served:
        for key in keys:
            headers = {"authorization": f"Bearer {key}"}
            assert (await served.http.get("/v1/models", headers=headers)).status_code == 200
        found = await scrape(served.http)
    answers = {k: v for k, v in found.items() if k.startswith("aioengine_tenant_http_responses_total")}
    assert len(answers) == 3 and sum(answers.values()) == 5
    assert answers['aioengine_tenant_http_responses_total{status="200",tenant="other"}'] == 3


def test_an_engine_that_starts_has_a_state_and_nothing_else() -> None:
    _, text = starting_metrics("e")
    lines = [line for line in text.decode().splitlines() if not line.startswith("#")]
    assert 'aioengine_engine_state{engine="e",state="starting"} 1.0' in lines and len(lines) == 5
