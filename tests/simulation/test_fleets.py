"""Fleets to which everything happens, by seed: every request ends once, and with exactly its tokens.

``AIOENGINE_FLEET_SEEDS=1000`` runs as many seeds.
"""

from __future__ import annotations

import os
import random

import pytest
from support.faulty_fleet import Conditions, Fault, play_fleet
from support.lab_sim import MB, Fixed, costs

from aioengine.lab.costs.model import Stage
from aioengine.lab.workload.requests import AdapterShape, Arrival
from aioengine.schedulers.registry import available

SEEDS = int(os.environ.get("AIOENGINE_FLEET_SEEDS", "12"))
MODEL = costs(disk=Stage(latency=0.05, bandwidth=MB), slot=Stage(latency=0.02, bandwidth=10 * MB))
END = 6.0


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.slow
def test_seed(seed: int) -> None:
    rng = random.Random(seed)
    replicas = rng.randint(1, 4)
    arrivals = _arrivals(rng)
    conditions = Conditions(
        delay=rng.choice([0.0, 0.001, 0.1]),
        report_delay=rng.choice([0.0, 0.5]),
        detect_seconds=rng.choice([0.0, 0.05, 0.5]),
        skew={index: rng.choice([0.0, 1e4, -1e4]) for index in range(replicas)},
        faults=_faults(rng, replicas),
    )
    routers, placements = sorted(available("router")), sorted(available("placement"))
    router, placement = routers[seed % len(routers)], placements[seed % len(placements)]
    scaling = rng.choice([None, None, "waiting_work:least=0,most=4,target=0.2,cool_down=1,settle=1"])
    conditions = conditions._replace(scale_seconds=0.25, start_seconds=rng.choice([0.0, 0.5, 3.0]))
    found, kept = play_fleet(
        Fixed(arrivals, [AdapterShape(name, 8) for name in "abcd"]),
        conditions,
        model=MODEL,
        max_num_seqs=4,
        replicas=replicas,
        router=router,
        placement=placement,
        autoscale=scaling,
        silent_seconds=rng.choice([1.5, 3.0]),
        migration_limit=rng.choice([0, 3, 100]),
        placement_seconds=rng.choice([0.5, 10.0]),
    )
    assert not found.failures, found.failures
    assert sorted(row.request_id for row in kept.requests) == sorted(f"r{i}" for i in range(len(arrivals)))
    for row in kept.requests:
        arrival = arrivals[int(row.request_id[1:])]
        assert row.error in (None, "EngineStopped", "EngineDead")
        if row.error is None:
            assert row.output_tokens == arrival.output_tokens, row
            assert row.first_token is not None and row.arrival <= row.first_token <= row.ended + 1e-9
    if not conditions.faults:
        assert all(row.error is None for row in kept.requests) and found.migrations == 0


def _arrivals(rng: random.Random) -> list[Arrival]:
    times = sorted(rng.uniform(0.0, END) for _ in range(rng.randint(5, 40)))
    return [
        Arrival(
            time,
            rng.choice([None, "a", "b", "c", "d"]),
            rng.randint(1, 60),
            rng.randint(1, 30),
            tenant=rng.choice([None, "x", "y"]),
        )
        for time in times
    ]


def _faults(rng: random.Random, replicas: int) -> list[Fault]:
    """None for one seed in four; what is cut is healed in the end, so that all can end."""
    if rng.random() < 0.25:
        return []
    kinds = ("kill", "start", "cut", "heal", "drain")
    faults = [
        Fault(rng.uniform(0.0, 1.5 * END), rng.choice(kinds), rng.randrange(replicas))
        for _ in range(rng.randint(1, 10))
    ]
    return [*faults, *(Fault(2.0 * END, "heal", index) for index in range(replicas))]
