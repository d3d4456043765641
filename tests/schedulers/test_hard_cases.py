"""The cases that break simple schedulers, each in virtual time and with its bound stated."""

from __future__ import annotations

import random

import pytest

from aioengine.core.state import Request
from aioengine.schedulers import SchedulerPolicy, load_policy
from aioengine.schedulers.policies.fcfs import FCFS
from aioengine.testing import LIMITS, Sim

STEP = 0.05


BUILT_IN = [
    "fcfs",
    "vllm",
    "sjf",
    "edf",
    "vtc",
    "drr",
    "priority+priority",
    "slora",
    "chameleon",
    "fcfs+lfu",
    "fcfs+gdsf",
    "vllm+gdsf",
]


# (a) One slot, a hot adapter that never pauses, and one request for another


def flood_one_slot(policy: SchedulerPolicy, seconds: float, tokens: int = 8) -> tuple[Request, float]:
    """A, B, A, A, A, ...: B's request, and when it came."""
    sim = Sim(LIMITS._replace(num_slots=1), policy)
    sim.register("A")
    sim.register("B")
    sim.add("A", max_tokens=tokens)
    sim.settle(step_seconds=STEP)
    b, arrival = sim.add("B", max_tokens=tokens), sim.now
    while sim.now < arrival + seconds and b.first_token is None:
        sim.add("A", max_tokens=tokens)
        sim.settle(step_seconds=STEP)
    return b, arrival


@pytest.mark.parametrize("name", ["fcfs", "sjf", "edf", "vtc", "drr", "priority+priority"])
def test_a_cold_request_is_served_within_the_ageing_bound(name: str) -> None:
    max_wait, tokens = 1.0, 8
    b, arrival = flood_one_slot(load_policy(name), seconds=60.0, tokens=tokens)
    assert b.first_token is not None, "starved"
    # 2 max_wait, the longest generation that was running, and steps to read, to copy and to run it.
    assert b.first_token - arrival <= 2 * max_wait + (tokens + 5) * STEP


@pytest.mark.slow
def test_vllm_starves_it() -> None:
    bound = 1.0 + 13 * STEP
    b, _arrival = flood_one_slot(load_policy("vllm"), seconds=20 * bound)
    assert b.admitted is None, "a busy slot was given up: this is not what vLLM does"


# (b) The base model needs no slot


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.slow
def test_base_requests_are_as_fast_as_without_adapters(name: str) -> None:
    def base_admissions(with_adapters: bool) -> tuple[list[float], Sim]:
        limits = LIMITS._replace(num_slots=2, max_num_seqs=64, num_blocks=400, max_num_batched_tokens=200)
        sim = Sim(limits, load_policy(name))
        times: list[float] = []
        base: list[Request] = []
        for adapter in "abcd":
            sim.register(adapter)
        for step in range(100):
            if with_adapters and step % 2 == 0:
                sim.add("abcd"[step // 2 % 4], max_tokens=20)
            base.append(sim.add(max_tokens=3))
            sim.settle(step_seconds=STEP)
        for request in base:
            assert request.admitted is not None
            times.append(request.admitted)
        return times, sim

    alone, _ = base_admissions(with_adapters=False)
    beside, sim = base_admissions(with_adapters=True)
    assert beside == alone
    assert sum(slot.entry is not None for slot in sim.core.slots.slots) == 2, "the adapters fill the slots"


# (c) Deadlines


def deadlines_met(policy: SchedulerPolicy) -> int:
    """One at a time, each for 4 steps. In order of deadline all 12 end in time; in no other order do
    they, as the last possible moment of the k-th is that of k jobs and two steps of slack."""
    count, tokens = 12, 4
    sim = Sim(LIMITS._replace(max_num_seqs=1, num_slots=2), policy)
    for name in "ab":
        sim.register(name)
        sim.add(name, max_tokens=1)
    sim.run()
    places = list(range(count))
    random.Random(5).shuffle(places)
    for place in places:
        deadline = sim.now + ((place + 1) * tokens + 2) * STEP
        sim.add([None, "a", "b"][place % 3], max_tokens=tokens, deadline=deadline)
    sim.run(step_seconds=STEP)
    return sum(reason == "length" for reason in sim.ended.values()) - 2


def test_edf_meets_every_deadline_that_can_be_met() -> None:
    assert deadlines_met(load_policy("edf:max_wait=1e9")) == 12
    assert deadlines_met(FCFS(max_wait=1e9)) < 12, "the case is none: order of arrival meets all too"
