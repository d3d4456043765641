"""Time spent waiting for adapters, and what came of reading them early."""

from __future__ import annotations

import pytest
from support.metric_script import (
    added,
    admitted,
    by_label,
    ended,
    evicted,
    failed,
    loaded,
    loading,
    metrics,
    placed,
    placing,
    registered,
    samples,
    unloaded,
    value,
)

from aioengine import events


def wait_of(*script: events.Event) -> float | None:
    return value(samples(metrics(registered("a"), *script)), "request_adapter_wait_seconds_sum", adapter="a")


def test_no_wait_when_a_slot_holds_the_adapter() -> None:
    found = samples(
        metrics(registered("a"), placed("a", 0, time=1.0), added("a", time=2.0), admitted("a", time=9.0))
    )
    assert value(found, "request_adapter_wait_seconds_count", adapter="a") == 1
    assert value(found, "request_adapter_wait_seconds_sum", adapter="a") == 0


def test_the_wait_ends_when_a_slot_holds_the_adapter_not_when_the_request_runs() -> None:
    assert wait_of(added("a", time=2.0), placed("a", 0, time=5.5), admitted("a", time=9.0)) == 3.5


def test_an_eviction_while_it_waits_adds_to_it() -> None:
    script = [added("a", time=1.0), placed("a", 0, time=2.0), evicted("a", 0, time=5.0)]
    assert wait_of(*script, placed("a", 1, time=9.0), admitted("a", time=10.0)) == 1 + 4


def test_each_request_has_its_own_wait() -> None:
    script = [added("a", "one", time=1.0), added("a", "two", time=3.0), placed("a", 0, time=4.0)]
    script += [admitted("a", "one", time=4.0), admitted("a", "two", time=8.0), ended("a", request_id="one")]
    found = samples(metrics(registered("a"), *script))
    assert value(found, "request_adapter_wait_seconds_sum", adapter="a") == 3 + 1
    assert value(found, "request_adapter_wait_seconds_bucket", adapter="a", le="1.0") == 1
    assert value(found, "request_adapter_wait_seconds_bucket", adapter="a", le="5.0") == 2


def test_another_version_in_a_slot_does_not_count() -> None:
    script = [placed("a", 0), registered("a", version=2, replaces=1)]
    script += [added("a", time=1.0), placed("a", 1, version=2, time=4.0), admitted("a", time=4.0)]
    assert wait_of(*script) == 3


def test_who_ends_while_waiting_is_not_counted_and_neither_is_the_base_model() -> None:
    script = [added("a", time=1.0), ended("a", "abort"), added(None, "b"), admitted(None, "b")]
    found = samples(metrics(registered("a"), *script))
    assert by_label(found, "request_adapter_wait_seconds_count", "adapter") == {}


def test_a_resumed_request_is_not_counted_again() -> None:
    preempted = events.RequestPreempted(time=3.0, request_id="r", adapter="a")
    script = [added("a", time=1.0), placed("a", 0, time=2.0), admitted("a", time=2.0), preempted]
    script += [evicted("a", 0, time=4.0), placed("a", 0, time=7.0), admitted("a", time=8.0, resumed=True)]
    assert wait_of(*script) == 1


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        pytest.param([loading("a")], {}, id="not known yet"),
        pytest.param([loading("a"), loaded("a"), placed("a", 0)], {"used": 1}, id="used"),
        pytest.param([loading("a"), added("a"), loaded("a"), placed("a", 0)], {"used": 1}, id="in time"),
        pytest.param([loading("a"), loaded("a"), evicted("a", None)], {"wasted": 1}, id="wasted"),
        pytest.param([added("a"), loading("a"), loaded("a"), placed("a", 0)], {"late": 1}, id="late"),
        pytest.param([added("a"), ended("a"), loading("a"), evicted("a", None)], {"wasted": 1}, id="gone"),
        pytest.param([loading("a"), failed("a"), loading("a"), placed("a", 0)], {"used": 1}, id="failed"),
        pytest.param(
            [loading("a"), loaded("a"), placing("a", 0), failed("a"), evicted("a", None)],
            {"wasted": 1},
            id="the copy failed",
        ),
        pytest.param(
            [
                *(loading("a"), loaded("a"), placed("a", 0), evicted("a", 0), placed("a", 0)),
                *(evicted("a", 0), evicted("a", None), unloaded("a")),
            ],
            {"used": 1},
            id="counted once",
        ),
    ],
)
def test_prefetches(script: list[events.Event], expected: dict[str, float]) -> None:
    found = by_label(samples(metrics(registered("a"), *script)), "lora_prefetch_total", "result")
    assert found == {"used": 0, "wasted": 0, "late": 0, **expected}


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        pytest.param(
            [added("a", time=1.0), loaded("a", time=2.0), placing("a", 0, time=5.0)], [3], id="read"
        ),
        pytest.param([loaded("a", time=2.0), added("a", time=4.0), placing("a", 0, time=5.0)], [1], id="cpu"),
        pytest.param([loaded("a", time=2.0), placing("a", 0, time=5.0)], [], id="nobody waits"),
        pytest.param(
            [
                *(loaded("a"), placed("a", 0), added("a", time=1.0)),
                *(evicted("a", 0, time=2.0), placing("a", 1, time=6.0)),
            ],
            [4],
            id="evicted under it",
        ),
        pytest.param(
            [loaded("a"), added("a", time=1.0), ended("a"), added("a", time=3.0), placing("a", 0, time=5.0)],
            [2],
            id="the first one gave up",
        ),
    ],
)
def test_waiting_on_the_cpu_for_a_slot(script: list[events.Event], expected: list[float]) -> None:
    found = samples(metrics(registered("a"), *script))
    assert value(found, "lora_swap_seconds_count", stage="cpu") == len(expected)
    assert value(found, "lora_swap_seconds_sum", stage="cpu") == sum(expected)
