"""What a real server's ``/metrics`` says of its answers, its tenants, its state and its limits."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import httpx
import openai
import pytest
from support.engine_fixtures import Tiny
from support.server_fixtures import MODEL, Serve

from aioengine.metrics.starting import starting_metrics

KEYS = {"sk-a": "alice", "sk-b": "bob"}


async def scrape(http: httpx.AsyncClient) -> dict[str, float]:
    """By name and labels, without the engine's."""
    text = (await http.get("/metrics")).text
    found = {}
    for name, labels, value in re.findall(r"^(\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        others = [pair for pair in re.findall(r'\w+="[^"]*"', labels) if not pair.startswith("engine=")]
        found[f"{name}{{{','.join(others)}}}"] = float(value)
    return found


async def test_every_answer_is_counted_once(serve: Serve) -> None:
    async with serve(settings={"api_keys": KEYS}, key="sk-a") as served:
        http = served.http
        good = {"model": MODEL, "prompt": "x", "max_tokens": 2, "ignore_eos": True}
        assert (await http.post("/v1/completions", json=good)).status_code == 200
        for body, status in (({**good, "model": "nobody"}, 404), ({**good, "temperature": -1}, 400)):
            assert (await http.post("/v1/completions", json=body)).status_code == status
        wrong = {"authorization": "Bearer sk-wrong"}
        assert (await http.get("/v1/models", headers=wrong)).status_code == 401
        assert (await http.get("/nowhere/at/all")).status_code == 404
        found = await scrape(http)

    def answers(code: str, route: str, status: int) -> float | None:
        labels = f'code="{code}",route="{route}",status="{status}"'
        return found.get(f"aioengine_http_responses_total{{{labels}}}")

    assert answers("", "/v1/completions", 200) == 1
    assert answers("model_not_found", "/v1/completions", 404) == 1
    assert answers("invalid_value", "/v1/completions", 400) == 1
    assert answers("invalid_api_key", "other", 401) == 1
    assert answers("not_found", "other", 404) == 1
    assert found['aioengine_tenant_http_responses_total{status="404",tenant="alice"}'] == 2
    assert found['aioengine_tenant_http_responses_total{status="401",tenant="none"}'] == 1
    assert found['aioengine_tenant_requests_total{reason="length",tenant="alice"}'] == 1
    assert found['aioengine_tenant_generation_tokens_total{tenant="alice"}'] == 2
    assert found["aioengine_http_requests_active{}"] == 0


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
    async with serve(settings={"api_keys": keys}, key="sk-0", max_tenant_labels=2) as served:
        for key in keys:
            headers = {"authorization": f"Bearer {key}"}
            assert (await served.http.get("/v1/models", headers=headers)).status_code == 200
        found = await scrape(served.http)
    answers = {k: v for k, v in found.items() if k.startswith("aioengine_tenant_http_responses_total")}
    assert len(answers) == 3 and sum(answers.values()) == 5
    assert answers['aioengine_tenant_http_responses_total{status="200",tenant="other"}'] == 3


async def test_limits_and_what_runs_here(serve: Serve) -> None:
    async with serve(max_waiting=7, max_num_seqs=3) as served:
        found = await scrape(served.http)
        text = (await served.http.get("/metrics")).text
        kernels = served.engine._built.device.kernels
    assert found["aioengine_requests_waiting_limit{}"] == 7
    assert found["aioengine_requests_running_limit{}"] == 3
    assert found["aioengine_lora_cpu_adapters_limit{}"] == 3
    assert found["aioengine_kv_cache_blocks{}"] > 0
    assert found['aioengine_engine_state{state="ready"}'] == 1
    [info] = re.findall(r"^aioengine_build_info\{(.*)\} 1\.0$", text, re.MULTILINE)
    labels = dict(re.findall(r'(\w+)="([^"]*)"', info))
    assert labels["kernels"] == kernels != "" and labels["quantization"] == "none" and labels["torch"]


async def test_an_unmounted_adapter_root_is_counted(serve: Serve, tmp_path: Path, tiny_text: Tiny) -> None:
    root = tmp_path / "root"
    shutil.copytree(tiny_text.adapters["a"], root / "cold")
    async with serve(adapter_root=str(root)) as served:
        root.rename(tmp_path / "gone")
        body = {"model": "cold", "prompt": "x", "max_tokens": 1}
        assert (await served.http.post("/v1/completions", json=body)).status_code == 503
        found = await scrape(served.http)
    assert found['aioengine_lora_resolver_failures_total{reason="io"}'] == 1
    assert found['aioengine_lora_load_failures_total{reason="io"}'] == 0


def test_an_engine_that_starts_has_a_state_and_nothing_else() -> None:
    _, text = starting_metrics("e")
    lines = [line for line in text.decode().splitlines() if not line.startswith("#")]
    assert 'aioengine_engine_state{engine="e",state="starting"} 1.0' in lines and len(lines) == 5
