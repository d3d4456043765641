"""Rows of several steps at once are told as one step after the other."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
from support.rows import RowSim, model

from aioengine.testing import LIMITS

NAMES = (None, "a", "b", "c")


def told(seed: int, steps: int) -> list[Any]:
    """Everything that is told of random requests, whose steps are taken up to ``steps`` at once."""
    rng = random.Random(seed)
    limits = LIMITS._replace(num_blocks=60, prefix_caching=seed % 2 == 0)
    limits = limits._replace(speculation="ngram" if seed % 3 == 0 else "none")
    rare = 0.1 if seed % 2 else 0.0  # each keeps the device from several steps at once
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
        request = sim.add(
            rng.choice(NAMES),
            prompt=prompt,
            max_tokens=rng.choice([1, 8, 30]),
            constrained=rng.random() < rare,
            logprobs=0 if rng.random() < rare else None,
        )
        stop = rng.choice([(4, 5), (6, 3)]) if rng.random() < rare else None
        request.params = msgspec.structs.replace(request.params, stop=["a text"] if stop else [])
        sim.read(request, stop, late=rng.random() < 0.5)
        if rng.random() < 0.2:
            sim.core.end(rng.choice([*sim.core.requests.values()]), "abort", sim.now)
        elif rng.random() < 0.1:
            sim.register(str(rng.choice(NAMES[1:])))
        sim.take_events()
    sim.run(step_seconds=0.25)
    what = ("time", "request_id", "adapter", "reason", "output_tokens", "worst_gap")
    found: list[Any] = [(type(e).__name__, *(getattr(e, name, None) for name in what)) for e in sim.events]
    read = [(reader.tokens, reader.logprobs, reader.reason) for reader in sim.readers.values()]
    return [*found, sim.core.step, read]


@pytest.mark.parametrize("seed", range(6))
def test_several_steps_at_once_are_told_as_one_by_one(seed: int) -> None:
    one_by_one = told(seed, 1)
    assert told(seed, 3) == one_by_one
    assert told(seed, 8) == one_by_one
