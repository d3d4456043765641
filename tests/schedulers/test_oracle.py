"""The clairvoyant replacement: no other makes fewer swaps on demand paging."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from aioengine import events
from aioengine.schedulers import Composed, compose
from aioengine.schedulers.parts.base import Replacement
from aioengine.schedulers.parts.replacement import GDSF, LFU, LRU, Belady
from aioengine.schedulers.policies.chameleon import ChameleonCache
from aioengine.schedulers.policies.fcfs import FCFS
from aioengine.schedulers.policy import PolicyEvent
from aioengine.testing import LIMITS, Sim

OTHERS: list[Callable[[], Replacement]] = [
    LRU,
    LFU,
    lambda: LFU(half_life=0),
    GDSF,
    lambda: GDSF(cost="one"),
    ChameleonCache,
]


def swaps(replace: Replacement, trace: Sequence[str], num_slots: int) -> int:
    """Serve the requests one by one, at times 1, 2, 3, ..., from slots that are filled on demand."""
    adapters: dict[str, Any] = {
        name: SimpleNamespace(
            name=name,
            bytes=2**20,
            rank=8,
            waiting=0,
            oldest_arrival=None,
            slot_seconds=0.01,
            disk_seconds=0.1,
        )
        for name in set(trace)
    }
    slots = [SimpleNamespace(index=i, adapter=None, last_used=0.0) for i in range(num_slots)]
    count = 0
    for now, name in enumerate(trace, start=1):
        view: Any = SimpleNamespace(now=float(now), slots=slots, adapters=adapters, cpu_room=1)

        def tell(kind: str, adapter: str, now: int = now) -> None:
            replace.on_event(PolicyEvent(kind, float(now), None, adapter))

        slot: Any = next((s for s in slots if s.adapter == name), None)
        if slot is None:
            count += 1
            slot = next((s for s in slots if s.adapter is None), None)
            if slot is None:
                scores = {s.index: replace.score(view, s, adapters[s.adapter]) for s in slots}  # type: ignore
                slot = slots[min(scores, key=lambda index: (scores[index], index))]
                tell("adapter_evicted", slot.adapter)
            slot.adapter = name
            tell("adapter_placed", name)
        tell("request_admitted", name)
        slot.last_used = float(now)
    return count


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


def belady(trace: Sequence[str]) -> Belady:
    return Belady([(float(now), name) for now, name in enumerate(trace, start=1)])


@pytest.mark.parametrize("seed", range(20))
def test_no_other_replacement_makes_fewer_swaps(seed: int) -> None:
    trace = random_trace(seed, names=12, length=300)
    num_slots = 2 + seed % 5
    fewest = swaps(belady(trace), trace, num_slots)
    for other in OTHERS:
        assert fewest <= swaps(other(), trace, num_slots)
    assert fewest < swaps(LRU(), trace, num_slots), "or the trace would show nothing"


@pytest.mark.parametrize("seed", range(10))
def test_swaps_are_as_few_as_can_be(seed: int) -> None:
    trace = random_trace(seed, names=6, length=60)
    assert swaps(belady(trace), trace, 3) == fewest_swaps(trace, 3)


def test_next_use_on_the_engines_clock() -> None:
    replace = Belady([(3.0, "a"), (1.0, "a"), (2.0, "b")], start=100.0)
    assert replace.next_use("a", 0.0) == 101.0
    assert replace.next_use("a", 101.0) == 103.0, "what arrives now is no longer to come"
    assert replace.next_use("a", 103.0) == float("inf")
    assert replace.next_use("unknown", 0.0) == float("inf")


def trace_in_engine(policy: Composed, trace: Sequence[str]) -> int:
    """Swaps by the engine's core for the same, one request each second."""
    sim = Sim(LIMITS._replace(num_slots=3, cpu_capacity=20, max_num_seqs=1), policy)
    for name in sorted(set(trace)):
        sim.register(name)
    for now, name in enumerate(trace, start=1):
        sim.now = float(now)
        sim.add(name, max_tokens=1)
        sim.run()
    return len(sim.of(events.AdapterPlaced))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.slow
def test_in_the_engine_as_in_theory(seed: int) -> None:
    trace = random_trace(seed, names=8, length=80)
    future = [(float(now), name) for now, name in enumerate(trace, start=1)]
    fewest = trace_in_engine(compose(replace=Belady(future)), trace)
    assert fewest == fewest_swaps(trace, 3)
    for other in OTHERS:
        assert fewest <= trace_in_engine(compose(replace=other()), trace)
    assert fewest < trace_in_engine(FCFS(), trace)
