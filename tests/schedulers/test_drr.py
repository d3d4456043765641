"""Deficit round robin: turns, the bound on unfairness, and that only what was admitted is charged."""

from __future__ import annotations

import random

import pytest
from support.policy_cases import adapters_in_order, warm

from aioengine.core.state import Request
from aioengine.schedulers import Composed, SchedulerPolicy, compose
from aioengine.schedulers.policies.drr import DRR
from aioengine.schedulers.policies.fcfs import FCFS
from aioengine.testing import LIMITS, Sim


def drr(quantum: int = 512) -> Composed:
    return compose(order=DRR(quantum), max_wait=1e9)


def add_sized(sim: Sim, adapter: str | None, cost: int) -> Request:
    return sim.add(adapter, prompt=[3] * (cost - cost // 2), max_tokens=cost // 2)


def test_adapters_and_the_base_model_take_turns() -> None:
    sim = warm(drr(quantum=8), "ab", LIMITS._replace(max_num_seqs=1))
    queue = [None] * 4 + ["a"] * 4 + ["b"] * 4
    requests = [add_sized(sim, name, 8) for name in queue]
    sim.run()
    assert adapters_in_order(sim, requests) in {
        "".join(p) * 4 for p in ("-ab", "ab-", "b-a", "-ba", "a-b", "ba-")
    }


def unfairness(policy: SchedulerPolicy, seqs: int, largest: int) -> float:
    """The largest difference of admitted cost over any span in which all adapters are waited for."""
    rng = random.Random(11)
    sim = warm(policy, "abc", LIMITS._replace(max_num_seqs=seqs, num_blocks=12 * seqs))
    sizes = {"a": (4, largest), "b": (4, 8), "c": (largest // 2, largest)}
    waiting: dict[str, list[Request]] = {name: [] for name in "abc"}
    admitted = dict.fromkeys("abc", 0)
    history = [(0, 0, 0)]
    for _ in range(400):
        for name, (low, high) in sizes.items():
            for _ in range(seqs + 6 - len(waiting[name])):
                waiting[name].append(add_sized(sim, name, rng.randrange(low, high + 1)))
        sim.settle()
        for name, queue in waiting.items():
            for request in [r for r in queue if r.admitted is not None]:
                admitted[name] += request.prompt_len + request.params.max_tokens
                queue.remove(request)
        history.append((admitted["a"], admitted["b"], admitted["c"]))
    assert min(admitted.values()) > 0
    worst = 0
    for i, j in ((0, 1), (0, 2), (1, 2)):
        differences = [h[i] - h[j] for h in history]
        worst = max(worst, max(differences) - min(differences))
    return worst


@pytest.mark.parametrize("quantum", [1, 10, 64])
@pytest.mark.parametrize("seqs", [1, 3])
@pytest.mark.slow
def test_unfairness_is_within_the_bound(quantum: int, seqs: int) -> None:
    largest = 32
    bound = quantum + 2 * largest
    assert unfairness(drr(quantum), seqs, largest) <= bound
    assert unfairness(FCFS(max_wait=1e9), seqs, largest) > bound, "the case is none"


def test_what_the_core_does_not_admit_is_not_charged() -> None:
    """Most of each proposal finds no KV blocks: turns must pass on by what was admitted alone."""
    sim = warm(drr(quantum=8), "ab", LIMITS._replace(max_num_seqs=6, num_blocks=9))
    requests = [add_sized(sim, name, 16) for name in "aaaaaabbbbbb"]
    sim.run()
    order = adapters_in_order(sim, requests)
    assert len(order) >= 12
    for taken in range(1, 13):
        assert abs(order[:taken].count("a") - order[:taken].count("b")) * 16 <= 8 + 2 * 16
