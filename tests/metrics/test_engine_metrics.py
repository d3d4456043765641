"""The metrics of a real engine agree with what it did."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from tiny_models import build_adapter, build_model

from aioengine import AsyncEngine, EngineConfig, LoRAConfig, SamplingParams
from aioengine.errors import AdapterLoadError


def scrape(engine: AsyncEngine) -> dict[str, dict[tuple[str, ...], float]]:
    """Name -> label values in the order of the label names -> value."""
    found: dict[str, dict[tuple[str, ...], float]] = defaultdict(dict)
    for family in text_string_to_metric_families(generate_latest(engine.metrics.registry).decode()):
        for sample in family.samples:
            labels = tuple(value for _, value in sorted(sample.labels.items()))
            found[sample.name.removeprefix("aioengine_")][labels] = sample.value
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def adapters(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {n: build_adapter(model, folder / n, seed=i, r=4) for i, n in enumerate("abc")}


async def test_swaps_requests_and_occupancy(model: Path, adapters: dict[str, Path]) -> None:
    config = EngineConfig(
        model=str(model),
        dtype="float32",
        device="cpu",
        kv_cache_memory="8MiB",
        lora=LoRAConfig(max_loras=2, max_cpu_loras=2, max_lora_rank=4),
        max_adapter_labels=2,
    )
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    async with AsyncEngine(config) as engine:
        assert scrape(engine)["lora_slots"] == {
            ("free",): 2,
            ("loading",): 0,
            ("ready",): 0,
            ("draining",): 0,
        }
        for name, path in adapters.items():
            engine.register_adapter(name, path)
        sums: set[float] = set()

        def listen(_event: object) -> None:
            sums.add(sum(scrape(engine)["lora_slots"].values()))

        engine.add_listener(listen)
        for name in [None, *adapters, "c"]:  # one after the other, so that every number is known
            await engine.complete([3, 4, 5], params, adapter=name)
        engine.register_adapter("broken", "/nowhere")
        with pytest.raises(AdapterLoadError):
            await engine.complete([3, 4, 5], params, adapter="broken")
        async with asyncio.timeout(5):
            while engine.stats().running:
                await asyncio.sleep(0)
        found, stats = scrape(engine), engine.stats()

    assert sums == {2.0}  # at every event, in every state
    # c took the place of a, and the attempt to read the broken one that of b.
    assert found["lora_swaps_total"] == {("load",): 3, ("evict",): 2, ("replace",): 0}
    assert found["lora_swap_seconds_count"] == {("disk",): 3, ("slot",): 3}
    assert found["lora_swap_bytes_total"][("slot",)] > 0
    assert found["lora_cache_requests_total"] == {
        ("slot", "miss"): 4,
        ("slot", "hit"): 1,
        ("cpu", "miss"): 4,
    }
    assert found["lora_load_failures_total"] == {("io",): 1}
    assert found["requests_finished_total"] == {
        ("base", "length"): 1,
        ("a", "length"): 1,
        ("b", "length"): 1,
        ("other", "length"): 2,
        ("other", "error"): 1,
    }
    assert found["generation_tokens_total"] == {("base",): 5, ("a",): 5, ("b",): 5, ("other",): 10}
    assert sum(found["step_seconds_count"].values()) == stats.steps
    # The last token of a request is sampled but never computed: 3 + 4 tokens for each of five.
    assert found["step_tokens_total"] == {("prefill",): 15, ("decode",): 20}
    assert found["kv_cache_usage_ratio"] == {(): 0}
    assert found["policy_refusals_total"] == {} and found["policy_errors_total"] == {(): 0}
    slot = next(info.index for info in stats.slots if info.adapter == "c")
    assert found["lora_slot_info"] == {("c", "4", str(slot), "1"): 1}  # adapter, rank, slot, version
    assert found["lora_adapter_loaded"] == {("c", "slot", "false"): 1}
    assert (stats.slot_loads, stats.slot_evictions) == (3, 2)  # the two ways of counting agree
    assert (stats.slot_hits, stats.slot_misses) == (1, 4)
