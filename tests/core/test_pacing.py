"""Steps stay within ``max_step_seconds`` on devices of any speed, and everybody gets on."""

from __future__ import annotations

import random

import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from support.paced_sim import MACHINES, MIDDLING, PAIR_TOKENS, TARGET, Machine, PacedSim

from aioengine import events
from aioengine.core.pacing import GRAIN

SETTINGS = settings(max_examples=20, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
"""To shrink a failing example takes minutes, and the machine's numbers say enough."""


@settings(SETTINGS, max_examples=8)  # each takes half a second
@given(
    machine=MACHINES,
    forced=st.integers(1, 40),
    constrained=st.integers(1, 60),
    others=st.integers(0, 4),
    adapter=st.sampled_from([None, "a"]),
)
@pytest.mark.slow
def test_forced_tokens_are_paced(
    machine: Machine, forced: int, constrained: int, others: int, adapter: str | None
) -> None:
    """However many requests have some at once. Each that has begun is part of every step, and prompts beside
    them advance."""
    sim = PacedSim(machine, max_num_seqs=64)
    sim.forced = forced
    sim.register("a")
    for _ in range(others):
        sim.prompt(20, 1000)
    sim.prompt(600)
    for _ in range(12):
        sim.one_step()
    for _ in range(constrained):
        sim.prompt(2, 300, adapter, constrained=True)
    before, long = len(sim.batches), sim.prompt(1500)
    while len(sim.core.requests) > others:
        started = {request.id for request in sim.core.running.values() if request.output_tokens}
        batch = sim.one_step()
        assert batch is not None and started <= {work.request_id for work in batch.sequences}
        sim.core.check()
    assert long.first_token is not None
    over = [s / machine.bound(b) for b, s in zip(sim.batches, sim.seconds, strict=True)][before + 5 :]
    assert sum(ratio > 1.1 for ratio in over) <= 0.05 * len(over)


@SETTINGS
@given(machine=MACHINES, seed=st.integers(0, 2**32 - 1))
@pytest.mark.slow
def test_steps_stay_within_the_target(machine: Machine, seed: int) -> None:
    rng = random.Random(seed)
    sim = PacedSim(machine)
    sim.register("a")
    for _ in range(250):
        if rng.random() < 0.15 or not sim.core.requests:
            tokens = rng.randint(2000, 8000) if rng.random() < 0.2 else rng.randint(2, 300)
            sim.prompt(tokens, rng.randint(1, 80), rng.choice([None, "a"]))
        if rng.random() < 0.02:  # many short ones at once
            for _ in range(30):
                sim.prompt(rng.randint(1, GRAIN), 1, rng.choice([None, "a"]))
        sim.one_step()
    sim.core.check()
    over = [seconds / machine.bound(batch) for batch, seconds in zip(sim.batches, sim.seconds, strict=True)]
    # The first steps are a guess, as is the first one that is of another kind than all before.
    assert max(over[5:]) < 2.5
    assert sum(ratio > 1.1 for ratio in over) <= 0.05 * len(over)


@pytest.mark.parametrize("slowness", [0.5, 4.0, 8.0])
def test_proposed_tokens_are_paced(slowness: float) -> None:
    """They are worth it where a step's fixed cost is large. The text repeats itself for ever."""
    machine = MIDDLING._replace(fixed=30, memory=30)
    sim = PacedSim(machine, speculation="ngram")
    sim.slowness = slowness
    sim.next_token = lambda history: 10 + (history[0] * 7 + len(history)) % 11
    for _ in range(8):
        sim.prompt(5, 400)
    while sim.core.requests:
        sim.one_step()
    assert len(sim.seconds) < 300, "some are right"
    alone = slowness * machine.token * (30 + 30 + 2 * GRAIN)
    assert max(sim.seconds) < 1.1 * max(TARGET, alone)


@SETTINGS
@given(machine=MACHINES)
@example(Machine(5e-5, 30, 0.3 * PAIR_TOKENS, 3 * PAIR_TOKENS, 0.004, 1))  # the time of pairs is known late
@example(Machine(5e-5, 30, 0.3 * PAIR_TOKENS, 3 * PAIR_TOKENS, 0.004, 30))
def test_the_time_is_made_use_of(machine: Machine) -> None:
    sim = PacedSim(machine)
    sim.prompt(8000)
    while sim.core.requests:
        sim.one_step()
    grown = [(b, s) for b, s in zip(sim.batches, sim.seconds, strict=True)][8:-1]
    for batch, seconds in grown:
        [work] = batch.sequences
        grain = sim.machine.bound(batch) - TARGET
        assert seconds > TARGET * 0.7 - grain or len(work.tokens) in (GRAIN, 2048)


@SETTINGS
@given(machine=MACHINES, tokens=st.integers(2, 64), longs=st.integers(1, 4))
@pytest.mark.slow
def test_a_short_prompt_passes_long_ones_and_none_stands_still(
    machine: Machine, tokens: int, longs: int
) -> None:
    sim = PacedSim(machine)
    for _ in range(longs):
        sim.prompt(6000)
    for _ in range(12):
        sim.one_step()
    short = sim.prompt(tokens, 3)
    before = len(sim.batches)
    while short.first_token is None:
        sim.one_step()
    assert len(sim.batches) - before <= -(-tokens // GRAIN) + longs
    # Whatever comes, the oldest gets at least a smallest chunk in every step.
    while any(request.prompt_len == 6000 for request in sim.core.requests.values()):
        oldest = min(sim.core.running.values(), key=lambda request: request.seq)
        computed, remaining = oldest.computed, oldest.remaining
        sim.prompt(tokens, 2)
        sim.one_step()
        assert oldest.id in sim.ended or oldest.computed - computed >= min(GRAIN, remaining)


DROPS = st.floats(1.6, 8.0)
"""How many times slower a machine becomes all at once."""


@SETTINGS
@given(machine=MACHINES, drop=DROPS, decodes=st.integers(1, 8))
@pytest.mark.slow
def test_a_slower_machine_is_believed_at_once(machine: Machine, drop: float, decodes: int) -> None:
    """The step in which it becomes slower was formed before. The next is as long as the target or, where the
    machine is more than four times slower, as this is believed; and the third is."""
    sim = PacedSim(machine)
    for _ in range(decodes):
        sim.prompt(20, 4000)
    for _ in range(30):
        if not any(request.prompt_len > 20 for request in sim.core.requests.values()):
            sim.prompt(8000)
        sim.one_step()
    sim.prompt(8000)
    sim.slowness = drop
    after = []
    for _ in range(4):
        batch = sim.one_step()
        assert batch is not None
        alone = sim.machine._replace(token=machine.token * drop).bound(batch)
        after.append(sim.seconds[-1] / alone)
    assert after[1] < 1.35 * max(1.0, drop / 4)
    assert max(after[2:]) < 1.35


@SETTINGS
@given(
    machine=MACHINES,
    requests=st.lists(st.tuples(st.integers(1, 700), st.integers(1, 20)), min_size=1, max_size=12),
    blocks=st.integers(50, 200),
)
def test_outputs_do_not_depend_on_it(machine: Machine, requests: list[tuple[int, int]], blocks: int) -> None:
    """Preemption for want of blocks included."""
    outputs = []
    for target in (None, TARGET):
        sim = PacedSim(machine, max_step_seconds=target, num_blocks=blocks)
        sent = [sim.prompt(tokens, max_tokens) for tokens, max_tokens in requests]
        while sim.core.requests:
            sim.one_step()
            sim.core.check()
        outputs.append([request.tokens for request in sent])
        admitted = [event for event in sim.events if isinstance(event, events.RequestAdmitted)]
        assert len({event.request_id for event in admitted}) == len(requests)
    assert outputs[0] == outputs[1]
