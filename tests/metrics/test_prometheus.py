"""A real Prometheus scrapes a running engine, and what it then knows is what the engine says of itself."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.prometheus_server import BOUND, MISSING, Prometheus, prometheus
from support.tiny_models import build_adapter, build_model

from aioengine import AsyncEngine, EngineConfig, LoRAConfig, SamplingParams
from aioengine.metrics import serve_metrics

METRICS = Path(__file__).resolve().parents[2] / "metrics"
BOARD = METRICS / "dashboards" / "aioengine.json"

pytestmark = pytest.mark.skipif(
    MISSING,
    reason="needs prometheus and promtool, of Debian's package prometheus",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture
async def engine(model: Path, tmp_path: Path) -> AsyncIterator[AsyncEngine]:
    """Two slots, and three adapters that nobody has asked for yet."""
    config = EngineConfig(
        model=str(model),
        name="tiny",
        dtype="float32",
        device="cpu",
        kv_cache_memory="2MiB",
        lora=LoRAConfig(max_loras=2, max_cpu_loras=3, max_lora_rank=4),
    )
    async with AsyncEngine(config) as engine:
        for seed, name in enumerate(("json", "sql", "pirate")):
            engine.register_adapter(name, build_adapter(model, tmp_path / name, seed=seed, r=4))
        yield engine


async def work(engine: AsyncEngine) -> int:
    """One request after the other, so that adapters take each other's slots; returns their number."""
    names = ["json", "sql", "pirate", "json", "json", None, "sql"]
    for name in names:
        params = SamplingParams(max_tokens=4, ignore_eos=True)
        await engine.complete([3, 4, 5], params, adapter=name, tenant="alice")
        engine.metrics.http.responded("/v1/completions", 200, None, "alice")
    engine.metrics.http.responded("/v1/completions", 404, "model_not_found", "alice")
    return len(names)


@pytest.mark.slow
async def test_prometheus_knows_what_the_engine_knows(engine: AsyncEngine, tmp_path: Path) -> None:
    engine.metrics.export_process()
    with serve_metrics(engine, 0) as exporter:
        async with prometheus(tmp_path, f"127.0.0.1:{exporter.port}") as server:
            await server.wait('aioengine_lora_slots{state="free"}', lambda s: [v for _, v in s] == [2])
            done = await work(engine)
            await server.wait(
                "sum(aioengine_requests_finished_total)", lambda s: [value for _, value in s] == [done]
            )
            await slots_agree(server, engine)
            await swaps_agree(server, engine)
            await rules_are_evaluated(server)
            await dashboard_has_data(server)
            await an_emptied_slot_is_free(server, engine)


async def slots_agree(server: Prometheus, engine: AsyncEngine) -> None:
    slots = engine.stats().slots
    states = Counter(slot.state.lower() for slot in slots)
    found = await server.by("state", "aioengine_lora_slots")
    assert found == {state: states[state] for state in ("free", "loading", "ready", "draining")}
    held = {labels["slot"]: labels for labels, _ in await server.query("aioengine_lora_slot_info")}
    assert {slot: labels["adapter"] for slot, labels in held.items()} == {
        str(slot.index): slot.adapter for slot in slots if slot.adapter is not None
    }
    assert {labels["engine"] for labels in held.values()} == {"tiny"}


async def swaps_agree(server: Prometheus, engine: AsyncEngine) -> None:
    stats = engine.stats()
    assert stats.slot_evictions > 0, "the work was meant to cause swaps"
    expected = {"load": stats.slot_loads, "evict": stats.slot_evictions, "replace": 0}
    assert await server.by("kind", "aioengine_lora_swaps_total") == expected
    series = "aioengine_lora_swaps_total[5m]"
    # Prometheus saw the engine before the first swap: what it saw happen since is all that happened.
    assert await server.by("kind", f"max_over_time({series}) - min_over_time({series})") == expected
    rates = await server.by("kind", f"rate({series})")
    assert {kind: rate > 0 for kind, rate in rates.items()} == {kind: n > 0 for kind, n in expected.items()}
    assert rates["load"] / rates["evict"] == pytest.approx(stats.slot_loads / stats.slot_evictions)
    hits = await server.by("result", 'aioengine_lora_cache_requests_total{level="slot"}')
    assert hits == {"hit": stats.slot_hits, "miss": stats.slot_misses}


async def rules_are_evaluated(server: Prometheus) -> None:
    async with asyncio.timeout(BOUND):
        while True:
            groups = (await server.get("rules"))["groups"]
            rules = [rule for group in groups for rule in group["rules"]]
            if all(rule["health"] != "unknown" for rule in rules):
                break
            await asyncio.sleep(0.05)
    assert len(groups) == 3 and {rule["health"] for rule in rules} == {"ok"}


async def dashboard_has_data(server: Prometheus) -> None:
    """Every panel's every expression finds series, but for what has not happened."""
    # A rate takes two samples, and an adapter's series begin with its first request.
    ends = "count_over_time(aioengine_requests_finished_total[5m])"
    await server.wait(ends, lambda samples: min(value for _, value in samples) >= 2)
    empty = set()
    panels = json.loads(BOARD.read_text(encoding="utf-8"))["panels"]
    fleet = next(i for i, panel in enumerate(panels) if panel["title"] == "Fleet")  # the last row
    for panel in panels[:fleet]:
        for target in panel.get("targets", []):
            expr = target["expr"].replace("$__rate_interval", "5m")
            for variable in ("instance", "engine", "adapter"):
                expr = expr.replace(f'"${variable}"', '".*"')
            assert "$" not in expr.replace('"0$1"', "")
            if not await server.query(expr):
                empty.add((panel["title"], target["refId"]))
    assert empty == {
        ("Policy refusals and errors", "A"),
        ("Slot timeline: adapter by slot", "B"),
        ("Pinned adapters", "A"),
    }


async def an_emptied_slot_is_free(server: Prometheus, engine: AsyncEngine) -> None:
    """The slot timeline goes on when an adapter has left and no other has come."""
    panels = json.loads(BOARD.read_text(encoding="utf-8"))["panels"]
    timeline = next(panel for panel in panels if panel["type"] == "state-timeline")
    held, free = (re.sub(r'"\$(?:instance|engine)"', '".*"', t["expr"]) for t in timeline["targets"])
    slots = {slot.index: slot.adapter for slot in engine.stats().slots}
    index, leaves = next((index, adapter) for index, adapter in slots.items() if adapter is not None)
    await engine.unload_adapter(leaves)
    await server.wait(free, lambda samples: len(samples) == 1)
    rows = {}
    for expr in (held, free):
        for labels, _ in await server.query(expr):
            rows[labels["row"].split(" ", 1)[1]] = labels["adapter"]
    assert rows == {f"tiny {i:02}": "(free)" if i == index else adapter for i, adapter in slots.items()}


async def test_promtool_has_nothing_to_say_about_the_names(engine: AsyncEngine) -> None:
    await work(engine)
    assert await asyncio.to_thread(lint, engine.metrics.expose()[0]) == (0, "")


def lint(exposition: bytes) -> tuple[int, str]:
    """promtool's exit status and all that it says."""
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=exposition, capture_output=True, check=False
    )
    return done.returncode, (done.stdout + done.stderr).decode()
