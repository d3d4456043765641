"""The engine under faults that are drawn by seed."""

from __future__ import annotations

import os
from collections import Counter

import pytest
from simulation.scenario import run

from aioengine import events

RUNS = int(os.environ.get("AIOENGINE_FUZZ_RUNS", "100"))  # make fuzz runs more
SEED = os.environ.get("AIOENGINE_FUZZ_SEED")
ONE_SEED = pytest.mark.skipif(SEED is not None, reason="AIOENGINE_FUZZ_SEED asks for that scenario alone")


@ONE_SEED
@pytest.mark.parametrize("seed", range(100, 125))
def test_a_few_seeds(seed: int) -> None:
    run(seed)


@pytest.mark.slow
def test_faults_by_seed() -> None:
    happened: Counter[type[events.Event]] = Counter()
    for seed in range(RUNS) if SEED is None else [int(SEED)]:
        happened.update(map(type, run(seed)))
    if SEED is None and RUNS >= 100:  # none of it may quietly stop happening
        rare = {
            kind.__name__: happened[kind]
            for kind in (
                events.AdapterFailed,
                events.AdapterUnloaded,
                events.EngineRestarted,
                events.PolicyFailed,
                events.PolicyOverran,
                events.PolicyReplaced,
                events.RequestPreempted,
            )
        }
        assert min(rare.values()) >= 1, rare


@ONE_SEED
@pytest.mark.parametrize("seed", [4, 5, 8, 11])
def test_a_seed_gives_the_same_events_every_time(seed: int) -> None:
    first, second = ("\n".join(map(str, run(seed))) for _ in range(2))
    assert first == second
    assert first.count("\n") > 10
