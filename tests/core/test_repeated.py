"""Decode steps that repeat the one before: they are those that would be formed anew."""

from __future__ import annotations

import random
from typing import Any

import pytest

from aioengine.step import Decodes, SequenceWork
from aioengine.testing import LIMITS, Sim


def driven(seed: int, *, repeats: bool) -> tuple[list[Any], int]:
    """All that is in the steps of random requests, of which some are aborted, preempted or constrained, and
    how many steps repeat the one before."""
    rng = random.Random(seed)
    caching, pace = rng.random() < 0.5, rng.choice((None, 0.03, 1e-3))
    sim = Sim(LIMITS._replace(prefix_caching=caching, max_step_seconds=pace, num_blocks=40))
    if not repeats:
        sim.core.batcher.repeated = None
    for name in ("a", "b", "c"):
        sim.register(name)
    steps, repeated = list[Any](), 0
    for _ in range(250):
        if rng.random() < 0.06:
            adapter = rng.choice((None, None, "a", "b", "c"))
            prompt = [rng.randrange(2, 200) for _ in range(rng.randrange(1, 30))]
            deadline = sim.now + rng.random() if rng.random() < 0.2 else None
            constrained = rng.random() < 0.1
            most = rng.randrange(1, 34)
            sim.add(adapter, prompt=prompt, max_tokens=most, deadline=deadline, constrained=constrained)
        if rng.random() < 0.02 and sim.core.requests:
            sim.core.end(rng.choice(list(sim.core.requests.values())), "abort", sim.now)
        for moves, finish in ((sim.loads, sim.finish_load), (sim.copies, sim.finish_copy)):
            if moves and rng.random() < 0.5:
                finish()
        batch = sim.schedule()
        sim.now += 0.01
        if batch is None:
            continue
        repeated += type(batch.sequences) is Decodes
        if rng.random() < 0.03 and sim.core.running:
            sim.core.end(rng.choice(list(sim.core.running.values())), "abort", sim.now)
        rows = [_plain(row) for row in batch.sequences]
        steps.append((batch._replace(sequences=rows), batch.contents()))
        sim.finish_step(seconds=0.001 * len(rows))
        steps.append(sim.intervals)
        sim.core.check()
    steps.append((sim.ended, [type(event) for event in sim.events]))
    return steps, repeated


def _plain(row: SequenceWork) -> tuple[Any, ...]:
    """A row as it is now: its lists grow, and constraints are objects."""
    constrained = row.params.constraint is not None
    return (*row._replace(block_table=list(row.block_table), history=len(row.history), params=constrained),)


@pytest.mark.parametrize("seed", range(12))
def test_they_are_those_that_would_be_formed_anew(seed: int) -> None:
    found, repeated = driven(seed, repeats=True)
    expected, none = driven(seed, repeats=False)
    differing = [place for place, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1]]
    assert not differing, (found[differing[0]], expected[differing[0]])
    assert repeated > 10 > none == 0
