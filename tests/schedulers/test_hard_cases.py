"""The cases that break simple schedulers, each in virtual time and with its bound stated."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Sequence
from functools import partial
from math import inf

import pytest
from support.policy_cases import TimedSim
from support.selection import mostly_slow

from aioengine import events
from aioengine.core import CoreLimits
from aioengine.core.state import Request
from aioengine.schedulers import Composed, SchedulerPolicy, compose, load_policy
from aioengine.schedulers.parts.base import Ordering
from aioengine.schedulers.policies.by_arrival import VLLMOrder
from aioengine.schedulers.policies.by_key import EDF, SJF, PreemptLower, Priority
from aioengine.schedulers.policies.drr import DRR
from aioengine.schedulers.policies.fcfs import FCFS
from aioengine.schedulers.policies.vtc import VTC
from aioengine.testing import LIMITS, Sim

STEP = 0.05


def composed(order: Ordering, max_wait: float = 1.0) -> Composed:
    return compose(order=order, max_wait=max_wait)


def vllm() -> Composed:
    return compose(order=VLLMOrder())


BUILT_IN: dict[str, Callable[[], SchedulerPolicy]] = {
    "fcfs": FCFS,
    "vllm": vllm,
    "sjf": lambda: composed(SJF()),
    "edf": lambda: composed(EDF()),
    "vtc": lambda: composed(VTC()),
    "drr": lambda: composed(DRR()),
    "priority": lambda: compose(order=Priority(), preempt=PreemptLower()),
    **{
        name: partial(load_policy, name)
        for name in ("slora", "chameleon", "fcfs+lfu", "fcfs+gdsf", "vllm+gdsf")
    },
}


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


@pytest.mark.parametrize("name", ["fcfs", "sjf", "edf", "vtc", "drr", "priority"])
def test_a_cold_request_is_served_within_the_ageing_bound(name: str) -> None:
    max_wait, tokens = 1.0, 8
    b, arrival = flood_one_slot(BUILT_IN[name](), seconds=60.0, tokens=tokens)
    assert b.first_token is not None, "starved"
    # 2 max_wait, the longest generation that was running, and steps to read, to copy and to run it.
    assert b.first_token - arrival <= 2 * max_wait + (tokens + 5) * STEP


@pytest.mark.slow
def test_vllm_starves_it() -> None:
    bound = 1.0 + 13 * STEP
    b, _arrival = flood_one_slot(vllm(), seconds=100 * bound)
    assert b.admitted is None, "a busy slot was given up: this is not what vLLM does"


# (b) The base model needs no slot


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.slow
def test_base_requests_are_as_fast_as_without_adapters(name: str) -> None:
    def base_admissions(with_adapters: bool) -> tuple[list[float], Sim]:
        limits = LIMITS._replace(num_slots=2, max_num_seqs=64, num_blocks=400, max_num_batched_tokens=200)
        sim = Sim(limits, BUILT_IN[name]())
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


# (c) Many adapters over few slots


class SwapSim(TimedSim):
    load_seconds, copy_seconds, step_seconds, token_seconds = 0.2, 0.02, 0.02, 0.0005


SWAP_LIMITS = CoreLimits(
    num_slots=8,
    cpu_capacity=64,
    max_loads=4,
    num_blocks=4096,
    block_size=16,
    max_num_seqs=32,
    max_num_batched_tokens=1024,
    max_model_len=2048,
    eos_token_ids=(1,),
)


def reached(sim: TimedSim, time: float) -> bool:
    return sim.now >= time


def swaps_and_p99(
    policy: Callable[[], SchedulerPolicy], rate: float, seeds: Sequence[int], requests: int = 600
) -> tuple[float, float]:
    """Slot loads per finished request, and the p99 time to first token, over all seeds."""
    swaps, ttft = 0, []
    for seed in seeds:
        rng = random.Random(seed)
        sim = SwapSim(SWAP_LIMITS, policy())
        for i in range(64):
            sim.register(f"a{i}")
        arrival = 0.0
        for _ in range(requests):
            arrival += rng.expovariate(rate)
            sim.go(partial(reached, sim, arrival), inf)
            prompt = [rng.randrange(2, 200) for _ in range(rng.randrange(8, 64))]
            sim.add(f"a{rng.randrange(64)}", prompt=prompt, max_tokens=rng.randrange(8, 32))
        sim.go(partial(operator.not_, sim.core.requests), inf)
        assert set(sim.ended.values()) == {"length"}
        swaps += len(sim.of(events.AdapterPlaced))
        ttft += [e.seconds for e in sim.of(events.FirstToken)]  # type: ignore[attr-defined]
    assert len(ttft) == requests * len(seeds)
    return swaps / len(ttft), sorted(ttft)[int(0.99 * len(ttft))]


@pytest.mark.parametrize("rate", mostly_slow([9.0, 11.0, 20.0], 11.0))
@pytest.mark.slow
def test_no_thrash_with_64_adapters_over_8_slots(rate: float) -> None:
    """From a load that the slots can carry to one far beyond it."""
    seeds = range(1, 6)  # a single run has too few requests in its slowest hundredth
    swaps, p99 = swaps_and_p99(FCFS, rate=rate, seeds=seeds)
    vllm_swaps, vllm_p99 = swaps_and_p99(vllm, rate=rate, seeds=seeds)
    print(f"rate {rate}: swaps per request {swaps:.3f} against {vllm_swaps:.3f}", end=", ")
    print(f"p99 TTFT {p99:.3f} against {vllm_p99:.3f} s")
    assert swaps <= vllm_swaps
    assert p99 < vllm_p99


# (d) One tenant floods


def service_gap(policy: SchedulerPolicy) -> tuple[float, float, float]:
    """(largest difference of service, the bound, the service of the tenant who floods) while both wait."""
    input_weight, output_weight, prompt_tokens, tokens = 1.0, 2.0, 6, 8
    sim = Sim(LIMITS._replace(max_num_seqs=5), policy)
    sim.register("a")
    sim.register("b")
    modest = [sim.add("b", prompt=[5, 6, 7], max_tokens=5, tenant="modest") for _ in range(2)]
    flood: list[Request] = []

    def service(requests: list[Request]) -> float:
        begun = [r for r in requests if r.admitted is not None]
        return sum(input_weight * r.prompt_len + output_weight * r.output_tokens for r in begun)

    gap, base = 0.0, 0.0
    for step in range(600):
        if step % 2 == 0:
            for token in (7, 9):
                request = sim.add("a", prompt=[token] * prompt_tokens, max_tokens=tokens, tenant="flood")
                flood.append(request)
        while sum(r.admitted is None for r in modest) < 6:  # more than one step can admit
            modest.append(sim.add("b", prompt=[5, 6, 7], max_tokens=5, tenant="modest"))
        sim.settle()
        if step == 20:  # both adapters are in
            base = service(flood) - service(modest)
        if step > 20:
            gap = max(gap, abs(service(flood) - service(modest) - base))
    batch_tokens = LIMITS.num_blocks * LIMITS.block_size
    bound = 2 * max(input_weight * prompt_tokens, output_weight * batch_tokens)
    return gap, bound, service(flood)


@pytest.mark.slow
def test_vtc_keeps_a_flooding_tenant_within_the_bound() -> None:
    gap, bound, served = service_gap(composed(VTC()))
    assert gap <= bound
    assert served > 3 * bound, "long enough to show a drift"
    unfair, _, _ = service_gap(FCFS())
    assert unfair > bound, "the case is none: first come, first served is as fair"


# (e) Deadlines


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
    assert deadlines_met(composed(EDF(), max_wait=1e9)) == 12
    assert deadlines_met(FCFS(max_wait=1e9)) < 12, "the case is none: order of arrival meets all too"
