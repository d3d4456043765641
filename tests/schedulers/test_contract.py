"""lpm, discard: what each does that others do not; and the contract that all policies keep."""

from __future__ import annotations

import pytest
from support.policy_cases import order_of

from aioengine import events
from aioengine.core import CoreLimits
from aioengine.core.state import Request
from aioengine.lab.policy_check.check import check_policy_contract
from aioengine.schedulers import available_policies, load_policy
from aioengine.testing import LIMITS, Sim

ONE = LIMITS._replace(max_num_seqs=1, num_blocks=200, max_model_len=200, max_num_batched_tokens=64)


def sim_of(policy: str, limits: CoreLimits = ONE) -> Sim:
    return Sim(limits, load_policy(policy))


def warmed(policy: str) -> Sim:
    """Two histories are in the KV cache: one of 12 tokens and one of 40."""
    sim = sim_of(policy)
    for history in ([7] * 12, [8] * 40):
        sim.add(prompt=[*history, 1], max_tokens=1)
    sim.run()
    sim.events.clear()
    return sim


def ask(sim: Sim) -> list[Request]:
    """New; a short history of a short prompt; a long history of a prompt that is mostly new."""
    prompts = ([9] * 16, [*[7] * 12, 3, 4], [*[8] * 40, *[5] * 60])
    return [sim.add(prompt=prompt, max_tokens=1) for prompt in prompts]


def test_the_longest_cached_prefix_goes_first() -> None:
    sim = warmed("lpm")
    new, short, long = ask(sim)
    sim.run()
    assert order_of(sim) == [long.id, short.id, new.id]


def test_nobody_is_put_off_for_longer_than_age() -> None:
    sim = warmed("lpm:age=0.5")
    new = sim.add(prompt=[9] * 16, max_tokens=1)
    for _ in range(100):
        sim.add(prompt=[*[7] * 12, 3], max_tokens=1)
        sim.settle(step_seconds=0.1)
        if new.admitted is not None:
            break
    assert new.admitted is not None
    assert new.admitted - new.arrival <= 0.7


def copies_of(policy: str, *, overlapping: bool) -> int:
    """How often an adapter is copied into a slot for ten requests, one after the other or all at once."""
    sim = sim_of(policy, ONE._replace(num_slots=2, max_num_seqs=4))
    sim.register("a")
    for _ in range(10):
        sim.add("a", max_tokens=3)
        if not overlapping:
            sim.run()
            sim.settle()  # as the engine does, the core asks the policy after the last step
    sim.run()
    assert set(sim.ended.values()) == {"length"}
    return len(sim.of(events.AdapterPlacing))


def test_discard_copies_an_adapter_again_for_each_burst_of_requests() -> None:
    assert copies_of("fcfs", overlapping=False) == 1
    assert copies_of("discard", overlapping=False) == 10
    assert copies_of("discard", overlapping=True) == 1, "requests wait for it until the last one runs"


@pytest.mark.parametrize("name", [*sorted(set(available_policies()) - {"oracle"}), "priority+priority"])
@pytest.mark.slow
def test_they_keep_the_contract(name: str) -> None:
    found = check_policy_contract(lambda: load_policy(name), runs=1, turns=30)
    assert found.sound, found.broken
