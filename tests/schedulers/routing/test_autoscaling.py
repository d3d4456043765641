"""Replicas by the work that waits: growth at once, shrinking after a while, within bounds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fleet_cases import Fleet

from aioengine.schedulers.routing.autoscaling import WaitingWork


def test_grows_with_waiting_tokens_and_with_adapters_that_wait() -> None:
    fleet, policy = Fleet(2), WaitingWork(most=8, settle=10.0)
    fleet.report_all(waiting=3, waiting_tokens=4000)
    assert policy.replicas(fleet.state.view, 2).replicas == 2
    fleet.report("r0", waiting=9, waiting_tokens=30_000)  # 3 s of work
    assert policy.replicas(fleet.state.view, 2).replicas == 4
    assert policy.replicas(fleet.state.view, 4).reason == "enough", "four are on their way"
    cold = {f"a{index}": 1 for index in range(10)}  # 10 loads of half a second
    fleet.report("r1", waiting=10, waiting_for=cold)
    assert policy.replicas(fleet.state.view, 4).reason == "growing", "what was started has no time to help"
    fleet.now += 11.0
    fleet.report_all(waiting=10, waiting_for=cold)
    assert policy.replicas(fleet.state.view, 4).replicas == 8
    fleet.now += 11.0
    assert policy.replicas(fleet.state.view, 8).replicas == 8, "no more than most"


def test_shrinks_one_by_one_after_the_cool_down() -> None:
    fleet, policy = Fleet(3), WaitingWork(least=2, cool_down=60.0)
    counts = []
    for _ in range(30):
        fleet.now += 10.0
        fleet.report_all()
        counts.append(policy.replicas(fleet.state.view, counts[-1] if counts else 4).replicas)
    assert counts[:6] == [4] * 6 and counts[6:12] == [3] * 6 and set(counts[12:]) == {2}


def test_requests_beyond_those_that_may_run_are_work_too() -> None:
    """Short prompts wait for others to end, and not for their own computing."""
    fleet, policy = Fleet(1), WaitingWork(target=1.0)
    fleet.report_all(running=8, waiting=16, waiting_tokens=160)
    assert policy.replicas(fleet.state.view, 1).replicas == 1, "nobody knows how long requests take"
    fleet.report_all(running=8, waiting=16, waiting_tokens=160, service_seconds=1.5)
    assert policy.replicas(fleet.state.view, 1).replicas == 2


@given(replicas=st.integers(2, 6), data=st.data())
def test_a_replica_goes_only_if_what_runs_fits_on_the_others(replicas: int, data: st.DataObject) -> None:
    """Full batches with nothing waiting are not idle."""
    fleet, policy = Fleet(replicas), WaitingWork(cool_down=60.0)
    running = data.draw(st.lists(st.integers(0, 8), min_size=replicas, max_size=replicas))
    for index, count in enumerate(running):
        fleet.report(f"r{index}", running=count)
    before = policy.replicas(fleet.state.view, replicas)
    fleet.now += 61.0
    for index, count in enumerate(running):
        fleet.report(f"r{index}", running=count)
    after = policy.replicas(fleet.state.view, replicas).replicas
    fits = sum(running) <= 0.7 * 8 * (replicas - 1)
    assert before.replicas == replicas and after == replicas - fits


def test_sleeps_and_wakes() -> None:
    fleet, policy = Fleet(1), WaitingWork(least=0, cool_down=5.0)
    fleet.report_all(running=1)
    assert policy.replicas(fleet.state.view, 1).replicas == 1
    fleet.report_all()
    policy.replicas(fleet.state.view, 1)
    fleet.now += 6.0
    assert policy.replicas(fleet.state.view, 1).replicas == 0
    assert policy.replicas(fleet.state.view, 0).replicas == 0
    assert policy.replicas(fleet.state.view, 0, waiting=1).replicas == 1


@pytest.mark.parametrize("options", [{"least": 3, "most": 2}, {"most": 0}, {"target": 0.0}, {"low": 1.0}])
def test_bad_values_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        WaitingWork(**options)  # type: ignore[arg-type]
