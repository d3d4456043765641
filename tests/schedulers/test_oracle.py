"""The clairvoyant replacement: no other makes fewer swaps on demand paging."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from aioengine import events
from aioengine.schedulers import compose
from aioengine.schedulers.parts.base import Replacement
from aioengine.schedulers.parts.replacement import Belady
from aioengine.testing import LIMITS, Sim


def fewest_swaps(trace: Sequence[str], num_slots: int) -> int:
    """By trying every choice of victim."""
    best: dict[frozenset[str], int] = {frozenset(): 0}
    for name in trace:
        after: dict[frozenset[str], int] = {}
        for held, count in best.items():
            if name in held:
                options, cost = [held], count
            else:
                cost = count + 1
                full = len(held) == num_slots
                options = [held - {gone} | {name} for gone in held] if full else [held | {name}]
            for option in options:
                after[option] = min(cost, after.get(option, cost))
        best = after
    return min(best.values())


def random_trace(seed: int, names: int, length: int) -> list[str]:
    """Some adapters more popular than others, and which ones changes half way."""
    rng = random.Random(seed)
    weights = [1 / (rank + 1) for rank in range(names)]
    halves = [rng.sample(range(names), names) for _ in range(2)]
    return [f"n{rng.choices(halves[index * 2 // length], weights)[0]}" for index in range(length)]


def test_next_use_on_the_engines_clock() -> None:
    replace = Belady([(3.0, "a"), (1.0, "a"), (2.0, "b")], start=100.0)
    assert replace.next_use("a", 0.0) == 101.0
    assert replace.next_use("a", 101.0) == 103.0, "what arrives now is no longer to come"
    assert replace.next_use("a", 103.0) == float("inf")
    assert replace.next_use("unknown", 0.0) == float("inf")


def swaps(replace: Replacement, trace: Sequence[str], num_slots: int = 3) -> int:
    """Serve a request each second, one by one, from slots that are filled on demand."""
    limits = LIMITS._replace(num_slots=num_slots, cpu_capacity=20, max_num_seqs=1)
    sim = Sim(limits, compose(replace=replace))
    for name in sorted(set(trace)):
        sim.register(name)
    for now, name in enumerate(trace, start=1):
        sim.now = float(now)
        sim.add(name, max_tokens=1)
        sim.run()
    return len(sim.of(events.AdapterPlaced))


def belady(trace: Sequence[str]) -> Belady:
    return Belady([(float(now), name) for now, name in enumerate(trace, start=1)])


@pytest.mark.parametrize("seed", range(10))
def test_swaps_are_as_few_as_can_be(seed: int) -> None:
    trace = random_trace(seed, names=6, length=60)
    assert swaps(belady(trace), trace) == fewest_swaps(trace, 3)
