"""Who has one request is served within twice its time alone, whatever another tenant floods the engine with.

In virtual time.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from support.policy_cases import TimedSim
from support.selection import mostly_slow

from aioengine.core import CoreLimits
from aioengine.core.state import Request
from aioengine.schedulers import load_policy
from aioengine.testing import Sim

LIMITS = CoreLimits(
    num_slots=4,
    cpu_capacity=4,
    max_loads=2,
    num_blocks=64 * 40,
    block_size=16,
    max_num_seqs=64,
    max_num_batched_tokens=512,
    max_model_len=4096,
    eos_token_ids=(1,),
)
BOUND = 2.0
"""Times the time alone, or the steps."""


@dataclass
class Flood:
    """What tenant a asks for, all at once."""

    count: int = 900
    adapters: int = 12
    prompt: int = 20
    tokens: int = 200
    kept_up: bool = False
    """Each request that ends is followed by another."""


FLOODS = {
    "sequences": Flood(adapters=0),
    "adapters": Flood(),
    "unique adapters": Flood(count=5000, adapters=5000),
    "ten thousand": Flood(count=10_000),
    "long prompts": Flood(count=200, adapters=0, prompt=3000, tokens=50),
    "blocks": Flood(count=200, adapters=0, prompt=600, tokens=600),
    "kept up": Flood(count=100, adapters=6, tokens=2000, kept_up=True),
}


def seconds_of(
    policy: str,
    flood: Flood | None,
    adapter: str | None,
    *,
    limits: CoreLimits = LIMITS,
    tenants: tuple[str | None, str | None] = ("a", "b"),
    times: int = 3,
) -> tuple[list[float], TimedSim, list[int]]:
    """How long each of b's requests takes, one after the other."""
    sim = TimedSim(limits, load_policy(policy))
    many, few = tenants

    def send(i: int) -> None:
        assert flood is not None
        name = f"a{i % flood.adapters}" if flood.adapters else None
        prompt = [2 + (i * 7 + k) % 900 for k in range(flood.prompt)]
        sim.add(name, prompt=prompt, max_tokens=flood.tokens, tenant=many)

    if flood is not None:
        for i in range(flood.adapters):
            sim.register(f"a{i}")
        for i in range(flood.count):
            send(i)
        began = sim.now
        sim.go(lambda: sim.now > began + 3.0, 10.0)
    if adapter is not None:
        sim.register(adapter)
    found, steps = list[float](), list[int]()
    for i in range(times):
        start, first = sim.now, sim.core.step
        request: Request = sim.add(adapter, prompt=[3 + i] * 30, max_tokens=20, tenant=few)

        def ended(request: Request = request) -> bool:
            if flood is not None and flood.kept_up:
                while len(sim.core.requests) < flood.count:
                    send(sim.count)
            return request.id in sim.ended

        sim.go(ended, 300.0)
        found.append(sim.now - start)
        steps.append(sim.core.step - first)
    return found, sim, steps


@pytest.mark.parametrize("flood", mostly_slow(FLOODS, "adapters", "long prompts"))
@pytest.mark.parametrize("adapter", [None, "mine"])
@pytest.mark.slow
def test_one_request_is_served_soon_while_another_tenant_floods(adapter: str | None, flood: str) -> None:
    """In steps, for a step that computes others' prompts too takes longer than one alone."""
    size = FLOODS[flood]
    for cpu_capacity in (LIMITS.num_slots, 16):
        limits = LIMITS._replace(cpu_capacity=cpu_capacity)
        alone, *_ = seconds_of("fair", None, adapter, limits=limits)
        beside, _, steps = seconds_of("fair", size, adapter, limits=limits)
        assert max(steps) <= BOUND * 20, "each needs 20"
        if flood in ("sequences", "adapters", "unique adapters", "ten thousand", "kept up"):  # others decode
            assert all(b <= BOUND * a for a, b in zip(alone, beside, strict=True))


@pytest.mark.parametrize("policy", ["fair", "vtc"])
@pytest.mark.parametrize("others", [1, 5])
@pytest.mark.slow
def test_tenants_whose_requests_end_with_their_first_step_take_turns(policy: str, others: int) -> None:
    """Nobody has more running requests then, so their number alone would let the longest queue go first."""
    sim = Sim(LIMITS._replace(max_num_seqs=1), load_policy(policy))
    for i in range(300):
        sim.add(prompt=[5, 6, 7 + i], max_tokens=1, tenant=f"a{i % others}")
    for i in range(10):
        waiting = sim.add(prompt=[5, 6, 7], max_tokens=1, tenant="b")
        for _ in range(others + 2):
            sim.settle()
        assert waiting.id in sim.ended, f"the {i}th has to wait"
    late = sim.add(prompt=[5, 6, 7], max_tokens=1, tenant="c")
    for i in range(2 * others + 4):  # tenants that come anew all the time do not shut it out
        sim.add(prompt=[8 + i], max_tokens=1, tenant=f"n{i}")
        sim.settle()
    assert late.id in sim.ended


@pytest.mark.slow
def test_the_case_is_one() -> None:
    beside, *_ = seconds_of("fcfs", FLOODS["sequences"], None)
    assert beside[0] > 100 * 0.41


@pytest.mark.parametrize("tenants", [(None, "b"), ("a", None)])
def test_those_who_name_no_tenant_are_one(tenants: tuple[str | None, str | None]) -> None:
    *_, steps = seconds_of("fair", FLOODS["adapters"], "mine", tenants=tenants)
    assert max(steps) <= BOUND * 20


@pytest.mark.parametrize("policy", ["fair", "vtc", "drr"])
@pytest.mark.slow
def test_more_tenants_than_slots_take_turns(policy: str) -> None:
    sim = TimedSim(LIMITS, load_policy(policy))
    for i in range(12):
        sim.register(f"a{i}")
    requests = [sim.add(f"a{i % 12}", max_tokens=300, tenant=f"t{i % 12}") for i in range(240)]
    firsts = requests[:12]
    sim.go(lambda: all(r.first_token is not None for r in firsts), 12 * 300 * 0.04)
    sim.run(steps=100_000, step_seconds=0.02)
    assert set(sim.ended.values()) == {"length"}


@pytest.mark.parametrize("tenant", [None, "a"])
@pytest.mark.slow
def test_with_one_tenant_nothing_changes(tenant: str | None) -> None:
    def told(name: str) -> list[str]:
        sim = TimedSim(LIMITS._replace(num_blocks=400), load_policy(name))
        rng = random.Random(3)
        for i in range(9):
            sim.register(f"a{i}")
        for _ in range(30):
            for _ in range(rng.randrange(6)):
                adapter = rng.choice([None, *(f"a{i}" for i in range(9))])
                sim.add(
                    adapter, prompt=[5] * rng.randrange(1, 90), max_tokens=rng.randrange(1, 60), tenant=tenant
                )
            before = sim.now
            sim.go(lambda before=before: sim.now > before + 0.1, 5.0)  # type: ignore[misc]
        sim.run(steps=5000)
        return [str(event) for event in sim.events]

    assert told("fair") == told("fcfs")
