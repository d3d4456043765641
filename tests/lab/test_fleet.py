"""Several engines behind a gateway, in virtual time: totals, deaths, partitions, old knowledge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.faulty_fleet import Conditions, Fault, play_fleet
from support.lab_sim import Fixed, played

from aioengine.errors import ConfigError
from aioengine.lab.fleet.fleet import SimulatedFleet
from aioengine.lab.runs.experiment import Experiment
from aioengine.lab.runs.simulate import run
from aioengine.lab.workload.requests import AdapterShape, Arrival
from aioengine.lab.workload.spec import WorkloadSpec

ADAPTERS = [AdapterShape(name, 8) for name in "abcdef"]


def spread(count: int = 60, *, every: float = 0.05, output: int = 40) -> Fixed:
    return Fixed(
        [Arrival(every * i, "abcdef"[i * i % 6], 20, output, tenant=f"t{i % 4}") for i in range(count)],
        ADAPTERS,
    )


@pytest.mark.slow
def test_a_partition_is_routed_around_and_heals() -> None:
    faults = [Fault(1.0, "cut", 1), Fault(12.0, "heal", 1)]
    found, kept = play_fleet(
        spread(400, every=0.05), Conditions(faults=faults), router="round_robin", silent_seconds=2.0
    )
    assert played(kept).finished == 400 and found.migrations > 0
    longest = max(row.ended - row.arrival for row in kept.requests)
    assert longest < 8.0, "it waited for the partition's end"
    assert found.by_replica[1] > 60, "it is used again afterwards"


def test_a_short_cut_costs_no_migration() -> None:
    conditions = Conditions(faults=[Fault(1.0, "cut", 1), Fault(1.5, "heal", 1)])
    found, kept = play_fleet(spread(), conditions, router="round_robin")
    assert played(kept).finished == 60 and found.migrations == 0


def test_a_draining_replica_finishes_what_it_has() -> None:
    found, kept = play_fleet(spread(), Conditions(faults=[Fault(1.0, "drain", 2)]), router="round_robin")
    assert played(kept).finished == 60 and found.migrations == 0
    assert found.by_replica[2] < 10


def test_with_no_replica_left_requests_are_rejected() -> None:
    faults = [Fault(1.0, "kill", index) for index in range(3)]
    found, kept = play_fleet(spread(), Conditions(faults=faults))
    rejected = [row for row in kept.requests if row.error == "EngineStopped"]
    assert len(rejected) == found.rejected > 0
    assert played(kept).finished + len(rejected) == 60


@pytest.mark.parametrize(("limit", "error"), [(2, "EngineDead"), (3, None)])
def test_a_request_whose_replicas_die_is_given_up_in_the_end(limit: int, error: str | None) -> None:
    faults = [fault for t in (1.0, 2.0, 3.0) for fault in (Fault(t, "kill", 0), Fault(t + 0.01, "start", 0))]
    long = Fixed([Arrival(0.0, None, 20, 1000)])
    found, kept = play_fleet(long, Conditions(faults=faults), replicas=1, migration_limit=limit)
    assert kept.requests[0].error == error and found.migrations == 3


@pytest.mark.parametrize("placement", ["none", "hrw"])
@pytest.mark.slow
def test_plans_are_carried_out(placement: str) -> None:
    found, kept = play_fleet(spread(220), placement=placement)
    assert played(kept).finished == 220
    assert bool(found.moves.get("load")) == (placement != "none")


@pytest.mark.slow
def test_replicas_come_with_a_burst_and_go_after_it() -> None:
    burst = [Arrival(0.02 * i, None, 20, 60) for i in range(600)]
    quiet = [Arrival(30.0 + 10 * i, None, 20, 60) for i in range(20)]
    scaling = "waiting_work:least=1,most=4,target=0.5,cool_down=20"

    def longest(**fields: Any) -> tuple[SimulatedFleet, float]:
        found, kept = play_fleet(Fixed(burst + quiet), replicas=1, max_num_seqs=8, **fields)
        assert played(kept).finished == 620 and found.migrations == 0, "nothing is lost as replicas go"
        return found, max(row.ended - row.arrival for row in kept.requests)

    _, alone = longest()
    found, scaled = longest(autoscale=scaling, conditions=Conditions(start_seconds=2.0))
    _, late = longest(autoscale=scaling, conditions=Conditions(start_seconds=30.0))
    assert scaled < late and scaled < 0.8 * alone, "a replica helps from when it has started"
    assert found.scaled is not None
    assert found.scaled.started >= 3 == found.scaled.stopped
    assert found.scaled.replica_seconds < 4 * quiet[-1].time


def test_a_fleet_that_sleeps_serves_the_next_request() -> None:
    arrivals = Fixed([Arrival(100.0 * i, "a", 20, 20) for i in range(4)], ADAPTERS)
    found, kept = play_fleet(
        arrivals,
        Conditions(start_seconds=7.0),
        replicas=1,
        autoscale="waiting_work:least=0,most=2,cool_down=10",
    )
    assert played(kept).finished == 4 and found.scaled is not None
    assert found.scaled.started == 3
    waits = [row.first_token - row.arrival for row in kept.requests if row.first_token is not None]
    assert waits[0] < 2 and all(7 < wait < 10 for wait in waits[1:]), waits


def experiment(**fields: Any) -> Experiment:
    workload = WorkloadSpec(
        arrivals="gamma:rate=40,cv=3",
        limit=150,
        adapters=12,
        popularity="zipf:1.0",
        output_tokens="uniform:4..60",
    )
    return Experiment(**{"workload": workload, "slots": 2, "cpu_loras": 4, "replicas": 3, **fields})


@pytest.mark.slow
def test_the_summary_keeps_its_keys_and_gains_the_fleet(tmp_path: Path) -> None:
    alone = run(experiment(replicas=None), tmp_path / "alone").summary
    first = run(experiment(placement="hrw"), tmp_path / "a")
    run(experiment(placement="hrw"), tmp_path / "b")
    for name in ("summary.json", "requests.csv", "slots.csv", "moves.csv", "samples.csv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert summary == first.summary
    assert summary.keys() - alone.keys() == {"fleet"} and alone.keys() <= summary.keys()
    fleet = summary["fleet"]
    assert (fleet["replicas"], fleet["router"], fleet["placement"]) == (3, "affinity", "hrw")
    assert sum(fleet["requests_by_replica"]) == summary["requests_offered"] == 150
    assert fleet["migrations"] == fleet["rejected"] == 0
    assert summary["slots"]["slots"] == 6 and 0 < summary["slots"]["busy_share"] <= 1
    assert 0 < summary["engine"]["stepping_share"] <= 1
    scaled = run(experiment(autoscale="waiting_work:most=4", start_seconds=1.0), tmp_path / "c").summary
    assert scaled["fleet"]["autoscale"]["policy"] == "waiting_work:most=4"
    assert scaled["slots"]["slots"] == 8, "those of all replicas that there may be"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"replicas": 0}, "replicas=0: must be >= 1"),
        ({"router": "afinity"}, "did you mean 'affinity'"),
        ({"placement": "demnd"}, "known are"),
        ({"autoscale": "waiting_work:most=2"}, "replicas=3: must be within the bounds"),
        ({"autoscale": "waiting_work:most=2", "replicas": None}, "give replicas"),
    ],
)
def test_bad_values_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        experiment(**fields)
