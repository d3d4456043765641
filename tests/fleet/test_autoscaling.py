"""What Serve's controller is told of the number of replicas; the policy itself is tested without a fleet."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from aioengine.fleet.autoscaling import ServeAutoscaler


def context(target: int, loads: list[dict[str, float]], queued: float = 0) -> Any:
    """Serve's ``AutoscalingContext``, as far as it is looked at."""
    names = {name for load in loads for name in load}
    metrics = {name: {f"r{i}": load[name] for i, load in enumerate(loads) if name in load} for name in names}
    return SimpleNamespace(
        target_num_replicas=target, aggregated_metrics=metrics, total_queued_requests=queued
    )


def test_grows_by_what_replicas_report_and_shrinks_to_nothing() -> None:
    times = iter([0, 1, 7, 8, 9])  # the controller's own: a system's clock may be set
    spec = "waiting_work:least=0,most=4,target=1,cool_down=5"
    scaler = ServeAutoscaler(spec, clock=lambda: next(times))
    idle = {"waiting": 0.0, "running": 0.0, "max_running": 8.0, "unknown": 1.0}
    full = {**idle, "waiting": 30.0, "running": 8.0, "queue_seconds": 2.5}
    assert scaler(context(2, [full, idle])) == (3, {"reason": "work waits"})
    assert scaler(context(1, [idle]))[0] == 1
    assert scaler(context(1, [idle]))[0] == 0
    assert scaler(context(0, []))[0] == 0
    assert scaler(context(0, [], queued=1)) == (1, {"reason": "requests wait"})


def test_calls_on_their_way_are_no_work() -> None:
    """Serve counts a gateway's channels, too, until a replica has taken them."""
    scaler = ServeAutoscaler("waiting_work:least=1,most=4")
    assert scaler(context(1, [{"running": 1.0}], queued=50)) == (1, {"reason": "enough"})
