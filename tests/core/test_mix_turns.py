"""Mixes and adapters take turns in the slots: nobody waits for ever."""

from __future__ import annotations

import os
import random

import pytest
from support.mix_world import World, core_with

from aioengine.core.adapters.assembly import MIX_LIMIT_SECONDS, MIX_PATIENCE_SECONDS
from aioengine.core.state import Request, Status
from aioengine.schedulers import Decision, SchedulerPolicy, SchedulerView, available_policies
from aioengine.schedulers.registry import load_policy
from aioengine.testing import LIMITS, Sim

POLICIES = sorted(available_policies().keys() - {"oracle", "belady"})


@pytest.mark.parametrize("name", POLICIES)
def test_steady_traffic_does_not_keep_a_mix_out(name: str) -> None:
    """Both slots have requests all the time, and each policy thinks of one slot at a time."""
    sim = Sim(LIMITS._replace(max_num_seqs=8, num_blocks=64), load_policy(name))
    for adapter in "abcd":
        sim.register(adapter)
    mix = None
    for step in range(1000):
        if step % 2 == 0:
            sim.add("ab"[step // 2 % 2], max_tokens=5, tenant="t" if step % 4 else None)
        if step == 50:
            mix = sim.add(sim.mix("c", "d"), tenant="m")
        sim.settle(step_seconds=0.05)
        if mix is not None and mix.id in sim.ended:
            break
    assert mix is not None and sim.ended[mix.id] == "length"
    assert sim.now - mix.arrival < 10


def test_time_alone_makes_a_mix_urgent() -> None:
    """Nothing happens but that tokens come; the core says when it must be asked again."""
    sim = core_with("a", "b", "c", "d", limits=LIMITS._replace(max_num_seqs=4))
    for name in ("a", "b"):
        sim.add(name, max_tokens=30)
    for _ in range(4):
        sim.settle()
    mix = sim.add(sim.mix("c", "d"))
    for _ in range(4):
        sim.settle()
    assert sim.core.next_due() == mix.arrival + MIX_PATIENCE_SECONDS
    sim.now = mix.arrival + MIX_PATIENCE_SECONDS
    late = sim.add("a", max_tokens=30)
    sim.settle()
    assert late.status is Status.WAITING, "its slot is closed"
    sim.run()
    assert sim.ended[mix.id] == sim.ended[late.id] == "length"


@pytest.mark.parametrize("name", POLICIES)
def test_steady_requests_for_a_part_keep_no_adapter_out(name: str) -> None:
    """Two slots; requests for a, scaled ones, mixes of a and b; c comes in as it does without the mixes."""
    took = [_steps_until_served(name, mixed=mixed) for mixed in (False, True)]
    assert took[1] <= took[0] + 150


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("length", [15, 70])
@pytest.mark.slow
def test_what_was_brought_in_for_an_earlier_request_is_not_taken_before_it_begins(
    name: str, length: int
) -> None:
    """Two mixes take turns in both slots, each after 1.5 or 7 s; a request for an adapter comes."""
    limits = LIMITS._replace(cpu_capacity=8, num_blocks=64, max_model_len=128)
    sim = Sim(limits, load_policy(name))
    for adapter in "abcde":
        sim.register(adapter)
    mixes: list[Request | None] = [None, None]
    alone = None
    for step in range(800):
        for index, parts in enumerate(["ab", "cd"]):
            before = mixes[index]
            if before is None or before.status is Status.ENDED:
                mixes[index] = sim.add(sim.mix(*parts), max_tokens=length)
        if step == 100:
            alone = sim.add("e")
        sim.settle(step_seconds=0.1)
        if alone is not None and alone.admitted is not None:
            break
    assert alone is not None and alone.admitted is not None
    assert alone.admitted - alone.arrival < 0.1 * 3 * length + 2


def _steps_until_served(name: str, *, mixed: bool) -> int:
    sim = Sim(LIMITS._replace(num_blocks=64), load_policy(name))
    for adapter in "abc":
        sim.register(adapter)
    wanted = None
    for step in range(1000):
        if step % 2 == 0:
            sim.add("ab"[step // 2 % 2], max_tokens=3)
        if mixed and step % 3 == 0:
            sim.add(sim.mix("a"), max_tokens=3)
        if mixed and step % 3 == 1:
            sim.add(sim.mix("a", "b"), max_tokens=3)
        if step == 20:
            wanted = sim.add("c")
        sim.settle(step_seconds=0.1)
        if wanted is not None and wanted.admitted is not None:
            return step
    return 1000


class Nothing(SchedulerPolicy):
    """Decides nothing, ever."""

    def schedule(self, view: SchedulerView) -> Decision:
        return Decision()


def test_a_policy_that_starves_adapters_starves_no_mix_behind_them() -> None:
    sim = Sim(LIMITS, Nothing())
    for name in "abc":
        sim.register(name)
    alone = sim.add("c")
    for _ in range(100):
        sim.settle(step_seconds=0.2)
    assert alone.admitted is None, "the policy's own fault"
    mix = sim.add(sim.mix("a", "b"))
    for _ in range(50):
        sim.settle(step_seconds=0.2)
    assert sim.ended == {alone.id: "length", mix.id: "length"}


def test_an_adapter_whose_read_has_just_begun_gets_no_turn() -> None:
    """It is waited for alone, and is a part of a mix, for which it is read first."""
    sim = Sim(LIMITS._replace(max_loads=1), Nothing())
    for name in "abcde":
        sim.register(name)
    sim.core.residency.want(sim.core.residency.current["e"], sim.now)
    requests = [sim.add(wanted) for wanted in (sim.mix("d", "a"), "d", sim.mix("b", "c"))]
    sim.schedule()
    sim.now += MIX_LIMIT_SECONDS
    sim.finish_load()
    sim.schedule()
    sim.core.check()
    sim.run(steps=200, step_seconds=0.2)
    assert [sim.ended[request.id] for request in requests] == ["length"] * 3


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("shape", ["fixed", "bytes"])
@pytest.mark.slow
def test_everybody_s_turn_comes(name: str, shape: str) -> None:
    """Clients that ask again and again, for adapters, scaled ones and mixes of two to four, in one to four
    slots, beside pinned adapters, which are replaced, and reads that never end: every request begins soon, or
    fails for a reason, and every pinned adapter gets a slot. Policies that let requests wait for ever by
    themselves do it with mixes, too."""
    bound = load_policy(name).starvation_bound
    for seed in range(int(os.environ.get("AIOENGINE_MIX_SEEDS", "1"))):
        world = World(name, shape, random.Random(f"{name} {shape} {seed}"))
        for _ in range(200):
            world.step()
        world.finish()
        assert world.longest["mix"] <= 150, (seed, world.longest)
        assert bound.startswith("none") or world.longest["plain"] <= 200, (seed, world.longest)
        assert world.longest["pin"] <= 150, (seed, world.longest)
