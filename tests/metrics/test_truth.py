"""Random runs: every number in the exposition is what the recorded events say it must be."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from support.metric_script import Samples, by_label, samples, value
from support.metric_truth import Truth

from aioengine import EngineStats
from aioengine import events as e
from aioengine.metrics import EngineMetrics
from aioengine.metrics.families import definitions
from aioengine.runtime.stats import Counters
from aioengine.testing import LIMITS, Sim


def assert_true(found: Samples, record: list[e.Event]) -> None:
    """Every counter and histogram series is as the record says, and no other has a value."""
    truth = Truth(record).numbers
    gauges = {d.name for d in definitions.ALL.values() if d.kind == "gauge"}
    summed = {k: v for k, v in found.items() if k[0] not in gauges}
    wrong = {
        key: (summed.get(key), truth.get(key))
        for key in summed.keys() | truth.keys()
        if summed.get(key, 0.0) != pytest.approx(truth.get(key, 0.0), abs=1e-9)
    }
    assert not wrong, "series: (exported, from the record)"


def assert_occupancy(found: Samples, stats: EngineStats) -> None:
    states = by_label(found, "lora_slots", "state")
    assert sum(states.values()) == len(stats.slots)
    swaps = by_label(found, "lora_swaps_total", "kind")
    assert swaps["load"] - swaps["evict"] == states["ready"] + states["draining"]
    assert (swaps["load"], swaps["evict"]) == (stats.slot_loads, stats.slot_evictions)
    held = {(i.index, i.adapter, i.version) for i in stats.slots if i.adapter is not None}
    info = [dict(labels) for name, labels in found if name == "aioengine_lora_slot_info"]
    assert {(int(s["slot"]), s["adapter"], int(s["version"])) for s in info} == held


def random_run(seed: int) -> tuple[Samples, list[e.Event]]:
    """Arrivals, aborts, failures, replacements and preemptions in virtual time; scraped all the while."""
    rng = random.Random(seed)
    sim = Sim(LIMITS._replace(num_blocks=8))
    counters = Counters()
    metrics = EngineMetrics(100, lambda: counters.snapshot(sim.core, 0), list)
    taken = 0

    def scrape() -> Samples:
        nonlocal taken
        sim.take_events()
        for event in sim.events[taken:]:
            counters(event)
            metrics.handle(event)
        taken = len(sim.events)
        found = samples(metrics)
        assert_occupancy(found, counters.snapshot(sim.core, 0))
        return found

    names = [f"a{i}" for i in range(5)]
    for name in names:
        sim.register(name)
    doing: dict[str, Callable[[], object]] = {
        "add": lambda: sim.add(
            rng.choice([None, *sim.core.residency.current]), max_tokens=rng.randrange(1, 12)
        ),
        "load": lambda: sim.loads and sim.finish_load(fail=rng.random() < 0.2),
        "copy": lambda: sim.copies and sim.finish_copy(fail=rng.random() < 0.1),
        "schedule": lambda: None if sim.batch else sim.schedule(),
        "step": lambda: sim.batch and sim.finish_step(),
        "abort": lambda: (
            sim.core.requests and sim.core.end(rng.choice([*sim.core.requests.values()]), "abort", sim.now)
        ),
        "want": lambda: sim.core.residency.names.of(rng.choice([*sim.core.residency.current])).load(sim.now),
        "replace": lambda: sim.register(rng.choice(names)),
        "unload": lambda: (
            len(sim.core.residency.current) > 2
            and sim.core.residency.names.of(rng.choice([*sim.core.residency.current])).unload(sim.now)
        ),
    }
    weights = [20, 25, 25, 60, 60, 3, 20, 1, 1]
    for _ in range(250):
        sim.now += rng.choice([0.001, 0.02, 0.7])
        doing[rng.choices([*doing], weights)[0]]()
        found = scrape()
    return found, sim.events


@pytest.mark.slow
def test_the_core_under_random_events() -> None:
    kinds: set[type[e.Event]] = set()
    results: set[str] = set()
    for seed in range(4):
        found, record = random_run(seed)
        assert_true(found, record)
        kinds |= {type(event) for event in record}
        prefetches = by_label(found, "lora_prefetch_total", "result")
        results |= {result for result, number in prefetches.items() if number}
        if value(found, "lora_swap_seconds_count", stage="cpu"):
            results.add("waited on the CPU")
    # The runs together have everything in them that is hard to count.
    assert {e.AdapterFailed, e.AdapterEvicted, e.AdapterUnloaded, e.RequestPreempted} <= kinds
    assert results == {"used", "wasted", "late", "waited on the CPU"}
