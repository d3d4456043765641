"""lpm, discard: what each does that others do not, and its bound."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from support.policy_cases import order_of

from aioengine import events
from aioengine.core import Core
from aioengine.core.state import Request
from aioengine.lab.policy_check.check import check_policy_contract
from aioengine.schedulers import load_policy
from aioengine.testing import LIMITS, Sim

ONE = LIMITS._replace(max_num_seqs=1, num_blocks=200, max_model_len=200, max_num_batched_tokens=64)


class FixedCosts:
    """A step takes 10 ms, and 1 ms more for each rank of the largest adapter; a prompt 1 ms a token."""

    def step(self, tokens: int, ranks: Sequence[int] = (), *, context: int = 0) -> float | None:
        return 0.01 + 0.001 * max(ranks, default=0)

    def prefill(self, tokens: int, rank: int = 0, *, cached: int = 0) -> float | None:
        return 0.001 * tokens

    def load(self, adapter: str, stage: str) -> float | None:
        return 0.1


def sim_of(policy: str, limits: Any = ONE) -> Sim:
    sim = Sim(limits, load_policy(policy))
    sim.core = Core(limits, load_policy(policy), costs=FixedCosts())
    return sim


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


@pytest.mark.parametrize("policy", ["lpm:age=0.5"])
def test_nobody_is_put_off_for_longer_than_age(policy: str) -> None:
    sim = warmed(policy)
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


def test_discard_empties_the_slot_as_soon_as_the_last_request_has_ended() -> None:
    sim = sim_of("discard")
    entry = sim.register("a")
    sim.add("a", max_tokens=2)
    sim.run()
    sim.settle()
    assert entry.slot is None
    assert entry.location.name == "CPU", "it stays in the CPU cache"


@pytest.mark.parametrize(
    "name",
    [
        *("fcfs", "vtc", "vllm", "chameleon", "fair", "lpm", "drr", "sjf", "edf", "priority", "slora"),
        *("discard", "gdsf", "lfu", "priority+priority"),
    ],
)
@pytest.mark.slow
def test_they_keep_the_contract(name: str) -> None:
    found = check_policy_contract(lambda: load_policy(name), runs=1, turns=30)
    assert found.sound, found.broken
