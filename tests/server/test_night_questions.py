"""Each question that is asked at night has an answer: a metric that a panel shows, an endpoint, or the log.

The answers are those that docs/runbook.md promises.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.engine_fixtures import MakeEngine, Tiny
from support.promql import asked
from support.server_fixtures import MODEL, Serve, served_by

import aioengine

ROOT = Path(__file__).resolve().parents[2]
PANELS = json.loads((ROOT / "metrics" / "dashboards" / "aioengine.json").read_text(encoding="utf-8"))[
    "panels"
]
KEYS = {"sk-a": "alice", "sk-b": "bob"}


async def scraped(http: httpx.AsyncClient) -> dict[str, dict[str, float]]:
    """Value by labels, by metric: the labels as they stand, without the engine's."""
    found: dict[str, dict[str, float]] = {}
    for name, labels, value in re.findall(
        r"^(\w+)\{(.*)\} (\S+)$", (await http.get("/metrics")).text, re.MULTILINE
    ):
        pairs = [pair for pair in re.findall(r'\w+="[^"]*"', labels) if not pair.startswith("engine=")]
        found.setdefault(name, {})[",".join(pairs)] = float(value)
    return found


def on_a_panel(*metrics: str) -> bool:
    shown = [asked(target["expr"]).metrics for panel in PANELS for target in panel.get("targets", ())]
    return all(any(metric in metrics_ for metrics_ in shown) for metric in metrics)


async def post(http: httpx.AsyncClient, model: str, key: str = "sk-a", **fields: Any) -> httpx.Response:
    body = {
        "model": model,
        "prompt": "What a long night it is",
        "max_tokens": 3,
        "ignore_eos": True,
        **fields,
    }
    headers = {"authorization": f"Bearer {key}"}
    return await http.post("/v1/completions", json=body, headers=headers)


async def test_who_gets_which_answers_and_who_uses_it(serve: Serve) -> None:
    async with serve(settings={"api_keys": KEYS}, key="sk-a", max_waiting=4) as served:
        http = served.http
        assert [(await post(http, MODEL, key)).status_code for key in ("sk-a", "sk-a", "sk-b")] == [200] * 3
        assert (await post(http, "nobody", "sk-b")).status_code == 404
        assert (await post(http, MODEL, "sk-wrong")).status_code == 401
        flood = await asyncio.gather(*(post(http, MODEL, "sk-b", n=8) for _ in range(8)))
        refused = sum(answer.status_code == 429 for answer in flood)
        assert refused > 0
        found = await scraped(http)
    by_code = found["aioengine_http_responses_total"]
    assert by_code['code="model_not_found",route="/v1/completions",status="404"'] == 1
    assert by_code['code="engine_overloaded",route="/v1/completions",status="429"'] == refused
    assert by_code['code="invalid_api_key",route="other",status="401"'] == 1
    by_tenant = found["aioengine_tenant_http_responses_total"]
    assert by_tenant['status="429",tenant="bob"'] == refused and by_tenant['status="404",tenant="bob"'] == 1
    assert 'status="429",tenant="alice"' not in by_tenant
    assert found["aioengine_tenant_generation_tokens_total"]['tenant="alice"'] == 6
    assert on_a_panel("aioengine_http_responses_total", "aioengine_tenant_http_responses_total")
    assert on_a_panel("aioengine_tenant_generation_tokens_total")


@pytest.mark.slow
async def test_which_adapter_fails_and_why_and_is_the_volume_gone(
    serve: Serve, tiny_text: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "adapters"
    for name in ("broken", "cold"):
        shutil.copytree(tiny_text.adapters["a"], root / name)
    weights = root / "broken" / "adapter_model.safetensors"
    weights.write_bytes(struct.pack("<Q", 10**6) + b"{}")
    with caplog.at_level(logging.WARNING, "aioengine"):
        async with serve(adapter_root=str(root)) as served:
            told = [await post(served.http, "broken") for _ in range(5)]
            assert {answer.status_code for answer in told} == {400}
            root.rename(tmp_path / "unmounted")
            assert (await post(served.http, "cold")).status_code == 503
            found = await scraped(served.http)
    lines = [record for record in caplog.records if "not loaded" in record.getMessage()]
    *broken, cold = [getattr(record, "data", {}) for record in lines]
    assert (broken[0]["adapter"], broken[0]["path"]) == ("broken", str(root / "broken"))
    assert "truncated" in broken[0]["reason"]
    assert all(text in lines[0].getMessage() for text in (broken[0]["path"], broken[0]["reason"]))
    assert [data["times"] for data in broken] in ([1, 2], [1, 2, 4]), "not once a request"
    assert lines[1].getMessage().endswith("(failed 2 times)")
    assert (cold["adapter"], cold["path"]) == ("cold", str(root)) and "No such file" in cold["reason"]
    assert found["aioengine_lora_load_failures_total"]['reason="invalid"'] >= 2
    assert found["aioengine_lora_resolver_failures_total"]['reason="io"'] == 1
    assert on_a_panel("aioengine_lora_load_failures_total", "aioengine_lora_resolver_failures_total")


@pytest.mark.slow
async def test_what_runs_since_when_and_whether_it_leaks(tiny_text: Tiny, make_engine: MakeEngine) -> None:
    async with make_engine(tiny_text, name="night") as engine:
        engine.metrics.export_process()
        async with served_by(engine) as served:
            found = await scraped(served.http)
            version = (await served.http.get("/version")).json()
    [info] = found["aioengine_build_info"]
    assert f'version="{aioengine.__version__}"' in info and 'kernels="' in info and 'torch="' in info
    assert version == {"version": aioengine.__version__}
    assert found["process_start_time_seconds"][""] > 1e9
    assert found["process_resident_memory_bytes"][""] > 2**20 and found["process_open_fds"][""] > 2
    assert on_a_panel("aioengine_build_info", "process_start_time_seconds", "process_resident_memory_bytes")
    assert on_a_panel("process_open_fds", "process_threads", "aioengine_event_loop_tasks")


async def test_what_is_pinned_how_full_it_is_and_what_caches_and_batches_bring(serve: Serve) -> None:
    settings = {"admin_keys": {"sk-admin": "ops"}}
    async with serve(
        settings=settings, key="sk-admin", max_waiting=7, max_num_seqs=3, enable_prefix_caching=True
    ) as served:
        await served.engine.pin_adapter("a")
        await asyncio.gather(*(post(served.http, "a", "sk-admin") for _ in range(3)))
        assert (await post(served.http, "a", "sk-admin")).status_code == 200
        found = await scraped(served.http)
    assert found["aioengine_lora_adapter_loaded"]['adapter="a",level="slot",pinned="true"'] == 1
    assert found["aioengine_requests_waiting_limit"][""] == 7
    assert found["aioengine_requests_running_limit"][""] == 3
    assert found["aioengine_lora_cpu_adapters_limit"][""] == 3
    assert found["aioengine_kv_cache_usage_ratio"][""] == 0
    assert found["aioengine_prompt_cached_tokens_total"][""] > 0
    assert found["aioengine_batch_sequences_count"][""] > 0
    assert sum(found["aioengine_request_e2e_seconds_count"].values()) == 4
    for metric in (
        "aioengine_lora_adapter_loaded",
        "aioengine_requests_waiting_limit",
        "aioengine_requests_running_limit",
        "aioengine_lora_cpu_adapters_limit",
        "aioengine_kv_cache_usage_ratio",
        "aioengine_prompt_cached_tokens_total",
        "aioengine_batch_sequences_bucket",
        "aioengine_request_e2e_seconds_bucket",
    ):
        assert on_a_panel(metric), metric


def test_the_runbook_answers_all_of_them() -> None:
    """What it promises is exported, and every alert has its section."""
    text = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")
    table = text[: text.index("\n## ")]
    rows = [line for line in table.splitlines() if line.startswith("|") and "`" in line]
    assert len(rows) == 12
    names = (ROOT / "tests" / "names.txt").read_text(encoding="utf-8")
    promised = re.findall(r"`((?:aioengine|process)_\w+)", table)
    assert promised and not [name for name in promised if f"metric {name} " not in f"{names}\n"]
