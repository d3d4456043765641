"""Rows of several steps at once are told as one step after the other."""

from __future__ import annotations

import random
from typing import Any

import pytest
from support.rows import RowSim, model

from aioengine import events
from aioengine.testing import LIMITS

NAMES = (None, "a", "b", "c")


def told(seed: int, steps: int) -> list[Any]:
    """Everything that is told of random requests, whose steps are taken up to ``steps`` at once."""
    rng = random.Random(seed)
    limits = LIMITS._replace(num_blocks=60, prefix_caching=seed % 2 == 0)
    sim = RowSim(limits, next_token=model, repeats=True)
    for name in NAMES[1:]:
        sim.register(str(name))
    due = 0.0
    for _ in range(30):
        due += rng.choice([0.0, 0.5, 3.0, 10.0])
        while sim.now < due:
            while sim.loads:
                sim.finish_load()
            while sim.copies:
                sim.finish_copy()
            batch = sim.schedule()
            sim.now += 0.25
            if batch is not None:
                moves = sim.loads or sim.copies  # they end before the next step
                sim.batch = batch._replace(until=sim.now if moves else min(batch.until, due))
                sim.finish_step(0.25, steps=steps)
        prompt = [rng.randint(2, 4) for _ in range(rng.randint(1, 20))]
        sim.read(sim.add(rng.choice(NAMES), prompt=prompt, max_tokens=rng.choice([1, 8, 30])))
        sim.take_events()
    sim.run(step_seconds=0.25)
    kinds = (events.FirstToken, events.RequestAdmitted, events.RequestEnded)
    found: list[Any] = [(type(e).__name__, e.time, e.request_id) for e in sim.events if isinstance(e, kinds)]
    found += [(e.worst_gap, e.output_tokens) for e in sim.of(events.RequestEnded)]
    return [*found, sim.core.step, [(reader.tokens, reader.reason) for reader in sim.readers.values()]]


@pytest.mark.parametrize("seed", range(6))
def test_several_steps_at_once_are_told_as_one_by_one(seed: int) -> None:
    one_by_one = told(seed, 1)
    assert told(seed, 3) == one_by_one
    assert told(seed, 8) == one_by_one
