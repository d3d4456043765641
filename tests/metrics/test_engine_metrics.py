"""The metrics of a real engine agree with what it did."""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path

import msgspec
import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from support.tiny_models import build_adapter, build_model

from aioengine import AsyncEngine, EngineConfig, SamplingParams
from aioengine.cli.flags import EngineFlags
from aioengine.schedulers import Decision, SchedulerView
from aioengine.schedulers.policies.fcfs import FCFS


def scrape(engine: AsyncEngine) -> dict[str, dict[tuple[str, ...], float]]:
    """Name -> label values in the order of the label names -> value."""
    found: dict[str, dict[tuple[str, ...], float]] = defaultdict(dict)
    for family in text_string_to_metric_families(generate_latest(engine.metrics.registry).decode()):
        for sample in family.samples:
            labels = tuple(value for key, value in sorted(sample.labels.items()) if key != "engine")
            assert sample.labels["engine"] == "default"
            found[sample.name.removeprefix("aioengine_")][labels] = sample.value
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def adapters(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {n: build_adapter(model, folder / n, seed=i, r=4) for i, n in enumerate("abc")}


async def test_name_and_compatibility_come_from_the_configuration(
    model: Path, adapters: dict[str, Path]
) -> None:
    flags = EngineFlags(model=str(model), kv_cache_memory="8MiB", metrics_compat="vllm").engine_config()
    config = msgspec.structs.replace(flags, name="blue", dtype="float32", device="cpu")
    async with AsyncEngine(config) as engine:
        engine.register_adapter("a", adapters["a"])
        await engine.complete([3, 4, 5], SamplingParams(max_tokens=2), adapter="a")
        found = text_string_to_metric_families(engine.metrics.expose()[0].decode())
        by_name = {family.name: family for family in found}
    assert {s.labels["engine"] for family in by_name.values() for s in family.samples} == {"blue"}
    (lora,) = by_name["vllm:lora_requests_info"].samples
    assert (lora.labels["max_lora"], lora.labels["running_lora_adapters"]) == ("4", "a")
    assert lora.labels["waiting_lora_adapters"] == ""


async def test_the_time_of_a_slow_policy_and_of_an_early_read(model: Path, adapters: dict[str, Path]) -> None:
    class Slow(FCFS):
        def schedule(self, view: SchedulerView) -> Decision:
            end = time.perf_counter() + 0.006
            while time.perf_counter() < end:
                pass
            return super().schedule(view)._replace(ask_again=None)  # so that it is asked in each step

    config = EngineConfig(model=str(model), dtype="float32", device="cpu", kv_cache_memory="8MiB")
    async with AsyncEngine(config, policy=Slow()) as engine:
        await engine.load_adapter("a", adapters["a"])
        await engine.complete([3, 4], SamplingParams(max_tokens=3, ignore_eos=True), adapter="a")
        found = scrape(engine)
    steps = found["policy_decision_seconds_count"][()]
    assert steps >= 3
    assert found["policy_decision_seconds_bucket"][("0.005",)] == 0
    assert 0.006 * steps <= found["policy_decision_seconds_sum"][()] < found["schedule_seconds_sum"][()]
    assert found["lora_prefetch_total"] == {("late",): 0, ("used",): 1, ("wasted",): 0}
