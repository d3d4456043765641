"""Where all decodes together take too long, requests of the tenants with many take turns."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from support.paced_sim import MACHINES, TARGET, Machine, PacedSim

from aioengine.core.pacing import GRAIN
from aioengine.core.state import Request
from aioengine.step import StepBatch

SETTINGS = settings(max_examples=10, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
SLOWNESS = st.sampled_from([1.0, 3.0, 10.0, 30.0])
ADAPTERS = st.sampled_from([None, "a"])


def flooded(machine: Machine, slowness: float, rows: int, adapter: str | None = None) -> PacedSim:
    """Return a simulation in which ``rows`` requests of the tenant "flood" decode."""
    sim = PacedSim(machine, max_num_seqs=64, num_blocks=20_000)
    sim.slowness = slowness
    sim.register("a")
    for _ in range(rows):
        sim.prompt(20, 4000, adapter, tenant="flood")
    while any(request.first_token is None for request in sim.core.requests.values()):
        sim.one_step()
    for _ in range(12):  # until the machine is known
        sim.one_step()
    return sim


def step(sim: PacedSim) -> StepBatch:
    batch = sim.one_step()
    assert batch is not None
    return batch


def decoding(sim: PacedSim) -> set[str]:
    return {request.id for request in sim.core.running.values() if request.last_token is not None}


def most_seconds(sim: PacedSim) -> float:
    """The target or, if that is more, twice what a step costs in which next to nothing is computed. That is
    guessed at first, and not known better while all steps are alike."""
    machine = sim.machine
    return max(TARGET, 2 * machine.token * sim.slowness * max(machine.fixed + machine.memory, GRAIN))


@SETTINGS
@given(machine=MACHINES, slowness=SLOWNESS, rows=st.integers(2, 63), adapter=ADAPTERS)
def test_a_tenant_with_one_request_is_not_slowed_down_by_a_flood(
    machine: Machine, slowness: float, rows: int, adapter: str | None
) -> None:
    sim = flooded(machine, slowness, rows, adapter)
    own = sim.prompt(20, 60, tenant="own")
    while own.first_token is None:
        sim.one_step()
    for _ in range(8):
        sim.one_step()
    before = len(sim.seconds)
    while own.id not in sim.ended:
        assert own.id in {work.request_id for work in step(sim).sequences}
    sim.core.check()
    assert max(sim.seconds[before:]) <= 1.35 * most_seconds(sim)


@SETTINGS
@given(machine=MACHINES, slowness=SLOWNESS, pause=st.integers(0, 20))
def test_nor_is_one_who_asks_again_and_again(machine: Machine, slowness: float, pause: int) -> None:
    """Also the step under way, for which its next request waits, is short."""
    sim = flooded(machine, slowness, 60)
    for turn in range(6):
        before = len(sim.seconds)
        own = sim.prompt(5, 5, tenant="own")
        while own.id not in sim.ended:
            sim.one_step()
        for _ in range(pause):
            sim.one_step()
        # A prompt may take a third of the decodes' time beside them.
        if turn > 1:
            assert max(sim.seconds[before:]) <= 1.35 * 4 / 3 * most_seconds(sim)


@SETTINGS
@given(
    machine=MACHINES,
    slowness=SLOWNESS,
    rows=st.lists(st.integers(1, 40), min_size=2, max_size=8),
    seed=st.integers(0, 2**32 - 1),
)
@pytest.mark.slow
def test_none_stands_still(machine: Machine, slowness: float, rows: list[int], seed: int) -> None:
    """A tenant's requests take turns, each tenant has one in each step, and all that have begun are in a step
    if none has few."""
    sim = PacedSim(machine, max_num_seqs=64)
    sim.slowness = slowness
    rng = random.Random(seed)
    for tenant, count in enumerate(rows):
        for _ in range(count):
            sim.prompt(rng.randint(1, 60), rng.randint(1, 40), tenant=str(tenant))
    skipped: Counter[str] = Counter()
    while sim.core.requests:
        began = {id: sim.core.requests[id] for id in decoding(sim)}
        batch = step(sim)
        inside = {work.request_id for work in batch.sequences}
        of = Counter(request.options.tenant for request in began.values())
        served = Counter(request.options.tenant for id, request in began.items() if id in inside)
        assert of.keys() == served.keys()
        for id, request in began.items():
            skipped[id] = 0 if id in inside else skipped[id] + 1
            assert skipped[id] <= 64, (of, served, request)
        sim.core.check()


@SETTINGS
@given(machine=MACHINES, slowness=SLOWNESS, tenants=st.integers(1, 8), each=st.integers(1, 8))
def test_equals_run_together(machine: Machine, slowness: float, tenants: int, each: int) -> None:
    """Turns would only cost time if nobody gained by them."""
    sim = PacedSim(machine, max_num_seqs=64)
    sim.slowness = slowness
    for place in range(tenants * each):
        sim.prompt(20, 80, tenant=str(place % tenants))
    while len(decoding(sim)) < tenants * each:
        sim.one_step()
    while not sim.ended:
        began = decoding(sim)
        assert began == {work.request_id for work in step(sim).sequences}


@SETTINGS
@given(
    machine=MACHINES,
    slowness=SLOWNESS,
    requests=st.lists(
        st.tuples(st.integers(1, 200), st.integers(1, 20), st.sampled_from("aaaab"), st.booleans()),
        min_size=1,
        max_size=30,
    ),
    blocks=st.integers(20, 200),
    speculation=st.sampled_from(["none", "ngram"]),
)
def test_outputs_do_not_depend_on_turns(
    machine: Machine,
    slowness: float,
    requests: list[tuple[int, int, str, bool]],
    blocks: int,
    speculation: str,
) -> None:
    """With preemption for want of blocks, forced tokens and proposed ones."""
    outputs = []
    for target in (None, TARGET):
        sim = PacedSim(machine, max_step_seconds=target, num_blocks=blocks, speculation=speculation)
        sim.slowness, sim.forced = slowness, 3
        sent: list[Request] = []
        for tokens, max_tokens, tenant, constrained in requests:
            sent.append(sim.prompt(tokens, max_tokens, tenant=tenant, constrained=constrained))
        while sim.core.requests:
            sim.one_step()
            sim.core.check()
        outputs.append([request.tokens for request in sent])
    assert outputs[0] == outputs[1]
