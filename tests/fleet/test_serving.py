"""A fleet of two replicas on Ray that nothing goes wrong with."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from support.engine_fixtures import Tiny
from support.fleet_process import START_SECONDS, FleetServer, needs_ray, until
from support.mixed_adapters import generated, scaled_model
from support.otlp_collector import Collector

needs_ray()


def test_two_processes_answer_as_one_engine(fleet: FleetServer, tiny_text: Tiny) -> None:
    assert len(fleet.replicas()) == 2
    prompt = [5, 6, 7, 8]
    found = fleet.complete(prompt, max_tokens=12, ignore_eos=True)
    assert found["token_ids"] == tiny_text.expected(prompt, 12)
    adapted = fleet.complete(prompt, max_tokens=12, ignore_eos=True, model="a")
    assert adapted["token_ids"] == tiny_text.expected(prompt, 12, "a")


def test_one_trace_from_the_gateway_to_the_step(fleet: FleetServer, traces: Collector) -> None:
    trace, caller = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    with fleet.client() as client:
        body = {"model": "a", "prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True}
        headers = {"traceparent": f"00-{trace}-{caller}-01"}
        assert client.post("/v1/completions", json=body, headers=headers).status_code == 200
    (http,) = traces.wait_for("POST /v1/completions", trace)
    (call,) = traces.wait_for("aioengine.fleet.request", trace)
    (sent,) = traces.wait_for("aioengine.fleet.attempt", trace)
    (request,) = traces.wait_for("aioengine.request", trace)
    (decode,) = traces.wait_for("decode", trace)
    parents = [http.parent, call.parent, sent.parent, request.parent, decode.parent]
    assert parents == [caller, http.id, call.id, sent.id, request.id]
    assert request.resource["service.instance.id"] == sent.attributes["aioengine.replica"]
    assert int(str(decode.attributes["aioengine.last_step"])) > 0


async def test_many_streams_use_both_replicas(fleet: FleetServer, tiny_text: Tiny) -> None:
    client = openai.AsyncOpenAI(base_url=f"{fleet.url}/v1", api_key="none", max_retries=0)

    async def stream(seed: int) -> str:
        parts = await client.completions.create(
            model="tiny", prompt=f"prompt {seed}", max_tokens=60, seed=seed, temperature=0.7, stream=True
        )
        return "".join([part.choices[0].text async for part in parts if part.choices])

    before = _finished_by_replica(fleet)
    texts = await asyncio.gather(*[stream(seed) for seed in range(24)])
    again = await asyncio.gather(*[stream(seed) for seed in range(24)])
    assert texts == again, "a seed's draws do not depend on the replica"
    after = _finished_by_replica(fleet)
    assert len(after) == 2
    for replica, number in after.items():
        assert number - before.get(replica, 0) >= 12, "neither replica has the most of it"
    await client.close()


def _finished_by_replica(fleet: FleetServer) -> dict[str, float]:
    found: dict[str, float] = {}
    for line in fleet.metrics().splitlines():
        if line.startswith("aioengine_request_ttft_seconds_count{"):
            replica = re.search(r'replica="([^"]+)"', line)
            assert replica is not None
            found[replica[1]] = found.get(replica[1], 0) + float(line.rsplit(" ", 1)[1])
    return found


def test_each_process_is_seen_and_every_sample_says_whose_it_is(fleet: FleetServer) -> None:
    with fleet.client() as client:
        targets = client.get("/metrics/targets").json()
        gateway, *replicas = names = [target["labels"]["__param_replica"] for target in targets]
        assert gateway == "door" and len(replicas) == 2
        for name in names:  # each can be scraped by itself; the gateway also knows of its replicas
            text = client.get("/metrics", params={"replica": name}).text
            found = set(re.findall(r'[{,]replica="([^"]+)"', text))
            assert found == ({name} if name != gateway else set(names))
        assert client.get("/metrics", params={"replica": "gone"}).status_code == 404
        text = client.get("/metrics", params={"name[]": "aioengine_requests_running"}).text
        assert len(re.findall(r'^aioengine_requests_running\{.*[{,]replica="', text, re.MULTILINE)) == 2
    samples = [line for line in fleet.metrics().splitlines() if line and not line.startswith("#")]
    owners = [re.findall(r'[{,]replica="([^"]+)"', line) for line in samples]
    assert {tuple(owner) for owner in owners} == {(name,) for name in names}
    for name in names:
        assert fleet.metric("process_resident_memory_bytes", replica=name) > 2**24
        assert 0 < fleet.metric("process_start_time_seconds", replica=name) < time.time()
        assert fleet.metric("aioengine_engine_state", replica=name, state="ready") == 1
    for name in ("aioengine_kv_cache_usage_ratio", "aioengine_fleet_route_seconds_count"):
        assert any(line.startswith(name) for line in samples), name
    assert fleet.metric("aioengine_log_dropped_total", replica=gateway) == 0


def test_errors_are_those_of_one_engine(fleet: FleetServer) -> None:
    with fleet.client() as client:

        def post(**fields: Any) -> httpx.Response:
            return client.post("/v1/completions", json={"model": "tiny", "prompt": "x", **fields})

        unknown = post(model="nobody")
        assert unknown.status_code == 404
        assert unknown.json()["error"]["code"] == "model_not_found"
        assert post(prompt="y" * 2000).json()["error"]["code"] == "context_length_exceeded"
        assert post(model="broken").status_code in (400, 503)
        bad = post(structured_outputs={"regex": "("}, max_tokens=5)
        assert bad.status_code == 400, bad.text
        good = post(structured_outputs={"regex": "[a-c]{4}z"}, max_tokens=20, temperature=1.0)
        assert re.fullmatch("[a-c]{4}z", good.json()["choices"][0]["text"])


async def test_a_client_that_leaves_ends_its_request(fleet: FleetServer) -> None:
    async with httpx.AsyncClient(base_url=fleet.url, trust_env=False) as client:
        body = {"model": "tiny", "prompt": "x", "max_tokens": 490, "ignore_eos": True, "stream": True}
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            async for _ in answer.aiter_lines():
                break
    await asyncio.to_thread(until, lambda: fleet.metric("aioengine_requests_running") == 0, 10)


def test_replaced_everywhere_or_nowhere(fleet: FleetServer, tiny_text: Tiny, adapters: Path) -> None:
    prompt = [9, 8, 7]
    old = tiny_text.expected(prompt, 8, "a")

    def answers() -> set[tuple[int, ...]]:
        return {
            tuple(fleet.complete(prompt, max_tokens=8, ignore_eos=True, model="swap")["token_ids"])
            for _ in range(6)
        }

    with fleet.client() as client:

        def load(path: str, **fields: Any) -> httpx.Response:
            return client.post(
                "/v1/load_lora_adapter", json={"lora_name": "swap", "lora_path": path, **fields}
            )

        assert load("a").status_code == 200
        assert answers() == {tuple(old)}
        refused = load("broken", load_inplace=True)
        assert refused.status_code == 400, refused.text
        assert answers() == {tuple(old)}, "a version that one replica cannot read is used by none"
        assert load("b", load_inplace=True).status_code == 200
        new = Tiny(tiny_text.model, {"b": adapters / "b"}).expected(prompt, 8, "b")
        assert answers() == {tuple(new)} != {tuple(old)}
        models = {card["id"] for card in client.get("/v1/models").json()["data"]}
        assert {"tiny", "swap"} <= models
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": "swap"}).status_code == 200
        gone = client.post("/v1/completions", json={"model": "swap", "prompt": "x"})
        assert gone.status_code == 404


def test_a_mix_and_an_upload(fleet: FleetServer, tiny_text: Tiny, adapters: Path) -> None:
    prompt, mix = [5, 6, 7, 8], {"a": 0.7, "b": -0.4}
    model = scaled_model(tiny_text.model, {adapters / name: weight for name, weight in mix.items()})
    expected = generated(model, prompt, 8)
    for _ in range(4):
        assert fleet.complete(prompt, max_tokens=8, ignore_eos=True, adapters=mix)["token_ids"] == expected
    files = [("files", (file.name, file.read_bytes())) for file in (adapters / "b").glob("adapter_*")]
    with fleet.client() as client:
        path = "/v1/upload_lora_adapter?lora_name=sent"
        answer = client.post(path, files=files)
        assert answer.status_code == 200, answer.text
        found = fleet.complete(prompt, max_tokens=8, ignore_eos=True, model="sent@1")
        assert found["token_ids"] == Tiny(tiny_text.model, {"b": adapters / "b"}).expected(prompt, 8, "b")
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": "sent"}).status_code == 200
        assert not [card["id"] for card in client.get("/v1/models").json()["data"] if "*" in card["id"]]


@pytest.mark.slow
def test_the_commands(fleet: FleetServer, tls: dict[str, str]) -> None:
    def command(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        return subprocess.run(
            [sys.executable, "-m", "aioengine", "fleet", *words, "--app-name", fleet.name],
            capture_output=True,
            text=True,
            check=False,
            timeout=START_SECONDS,
            env={**clean, **tls, **environment},
        )

    fleet.complete("x", max_tokens=1, model="a")
    there = {"RAY_ADDRESS": fleet.address}
    with ThreadPoolExecutor(2) as pool:
        asked = pool.submit(command, "status", **there)
        refused = pool.submit(command, "drain", "nobody", **there).result()
    names = re.findall(r"^ *(\w{8}) +running", asked.result().stdout, re.MULTILINE)
    assert len(names) == 2, asked.result().stderr
    assert refused.returncode == 2 and names[1] in refused.stderr
    assert re.search(r"running.* a\b", asked.result().stdout), "it is in a slot"
    assert "drains" in command("drain", names[0], **there).stdout
    until(lambda: fleet.metric("aioengine_fleet_replica_up", replica=names[0]) == 0)
    for index in range(4):
        fleet.complete(f"elsewhere {index}", max_tokens=2)
    command("drain", names[0], "--undo", **there)
    until(fleet.healthy)
