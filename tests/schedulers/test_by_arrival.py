"""Orders that begin with that of arrival: adapter clustering, vLLM's, and the longest cached prefix first."""

from __future__ import annotations

import pytest
from support.policy_cases import order_of, warm

from aioengine.core import CoreLimits
from aioengine.schedulers import Composed, compose
from aioengine.schedulers.policies.by_arrival import LPM, SLoRA, VLLMOrder
from aioengine.schedulers.policies.fcfs import FCFS
from aioengine.schedulers.policy import SchedulerPolicy
from aioengine.step import StepBatch
from aioengine.testing import LIMITS, Sim

NAMES = "abcd"
WIDE = LIMITS._replace(num_blocks=400, max_num_batched_tokens=64)


def slora(**options: float) -> Composed:
    return compose(order=SLoRA(**options))  # type: ignore[arg-type]


def adapters_in(batch: StepBatch | None) -> int:
    return 0 if batch is None else len({work.slot for work in batch.sequences if work.slot >= 0})


def distinct_per_batch(policy: SchedulerPolicy) -> float:
    sim = warm(policy, NAMES, WIDE._replace(max_num_seqs=4))
    for _ in range(8):
        for name in NAMES:
            sim.add(name, max_tokens=3)
            sim.now += 0.001
    counts = []
    while sim.core.requests:
        counts.append(adapters_in(sim.settle()))
    return sum(counts) / len(counts)


def test_fewer_distinct_adapters_in_a_batch_than_by_arrival() -> None:
    by_arrival, clustered = distinct_per_batch(FCFS(max_wait=60.0)), distinct_per_batch(slora(age=60.0))
    assert by_arrival == 4.0
    assert clustered == 1.0, "8 requests each, 4 at a time: one adapter after the other"


@pytest.mark.parametrize("clusters", [1, 2, 3])
def test_never_more_adapters_than_clusters(clusters: int) -> None:
    sim = warm(slora(clusters=clusters, age=0.05), NAMES, WIDE._replace(max_num_seqs=6))
    most = 0
    for step in range(120):
        sim.add(NAMES[step * 7 % 4], max_tokens=1 + step % 5)
        if step % 3 == 0:
            sim.add(None, max_tokens=2)
        most = max(most, adapters_in(sim.settle()))
    assert most == clusters


@pytest.mark.parametrize("seqs", [1, 2, 4])
def test_a_request_outside_the_batch_waits_for_its_age_and_one_generation(seqs: int) -> None:
    age, step, tokens = 1.0, 0.05, 8
    sim = warm(slora(clusters=1, age=age), NAMES, WIDE._replace(max_num_seqs=seqs))
    for _ in range(seqs):
        sim.add("a", max_tokens=tokens)
        sim.settle(step_seconds=step)
    arrival = sim.now
    older = [sim.add("a", max_tokens=tokens) for _ in range(2)]
    other = sim.add("b", max_tokens=tokens)
    for _ in range(200):
        sim.add("a", max_tokens=tokens)
        sim.add(None, max_tokens=tokens)
        sim.settle(step_seconds=step)
        if other.admitted is not None:
            break
    assert other.admitted is not None, "starved"
    before_it = -(-len(older) // seqs) * (tokens + 1) * step
    assert other.admitted - arrival <= age + before_it + (tokens + 1) * step
    if seqs > 1:
        assert other.admitted - arrival >= age, "put off in favour of the batch's adapter until then"


# vLLM


def vllm_sim(limits: CoreLimits) -> Sim:
    sim = Sim(limits, compose(order=VLLMOrder()))
    for name in "ab":
        sim.register(name)
    return sim


def test_nothing_is_read_ahead() -> None:
    sim = vllm_sim(LIMITS._replace(num_slots=1, cpu_capacity=3))
    sim.add("a", max_tokens=8)
    for _ in range(3):
        sim.settle()
    sim.add("b")
    sim.settle()
    assert not sim.loads, "b would have to wait for the slot anyway"


# The longest cached prefix


def warmed(order: LPM) -> Sim:
    """Two histories are in the KV cache: one of 12 tokens and one of 40."""
    limits = LIMITS._replace(max_num_seqs=1, num_blocks=200, max_model_len=200, max_num_batched_tokens=64)
    sim = Sim(limits, compose(order=order))
    for history in ([7] * 12, [8] * 40):
        sim.add(prompt=[*history, 1], max_tokens=1)
    sim.run()
    sim.events.clear()
    return sim


def test_the_longest_cached_prefix_goes_first() -> None:
    sim = warmed(LPM())
    new = [9] * 16
    prompts = (new, [*[7] * 12, 3, 4], [*[8] * 40, *[5] * 60])
    requests = [sim.add(prompt=prompt, max_tokens=1) for prompt in prompts]
    sim.run()
    assert order_of(sim) == [requests[i].id for i in (2, 1, 0)]


def test_nobody_is_put_off_for_longer_than_age() -> None:
    sim = warmed(LPM(age=0.5))
    new = sim.add(prompt=[9] * 16, max_tokens=1)
    for _ in range(100):
        sim.add(prompt=[*[7] * 12, 3], max_tokens=1)
        sim.settle(step_seconds=0.1)
        if new.admitted is not None:
            break
    assert new.admitted is not None
    assert new.admitted - new.arrival <= 0.7
