"""Rows of any number of tokens give each request what one token a step gives it.

Rows have no tokens (a late constraint), one, or several: drafts that are right or not, forced tokens, and
several steps at once. They cross stop strings over a row's edge, ends at any token, log-probabilities,
prefix hits, and requests that are aborted, preempted and replaced between forming and taking in.
"""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.rows import RowSim

from aioengine import events
from aioengine.schedulers import Decision, SchedulerView
from aioengine.schedulers.policies.fcfs import FCFS
from aioengine.testing import LIMITS

NAMES = (None, "a", "b", "c")


class Preempting(FCFS):
    """FCFS that preempts a running request now and then."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._rng = random.Random(seed)

    def schedule(self, view: SchedulerView) -> Decision:
        decision = super().schedule(view)
        running = sorted(request.request_id for request in view.running)
        if not running or self._rng.random() > 0.1:
            return decision
        return decision._replace(preempt=[self._rng.choice(running)])


def model(history: list[int]) -> int:
    """Texts that repeat themselves, so that some drafts are right, and end now and then."""
    return 1 if sum(history) % 41 == 7 else 2 + history[-1] % 5 + len(history) % 4 // 3


class RowMachine(RuleBasedStateMachine):
    @initialize(
        seed=st.integers(0, 2**32),
        preempts=st.booleans(),
        blocks=st.integers(17, 40),
        caching=st.booleans(),
        speculation=st.sampled_from(["none", "ngram"]),
        repeats=st.booleans(),
    )
    def start(
        self, seed: int, preempts: bool, blocks: int, caching: bool, speculation: Any, repeats: bool
    ) -> None:
        limits = LIMITS._replace(num_blocks=blocks, prefix_caching=caching, speculation=speculation)
        policy = Preempting(seed) if preempts else FCFS()
        self.sim = RowSim(limits, policy, model, repeats=repeats)
        for name in NAMES[1:]:
            self.sim.register(str(name))

    @rule(
        adapter=st.sampled_from(NAMES),
        prompt=st.lists(st.integers(2, 4), min_size=1, max_size=30),
        max_tokens=st.sampled_from([1, 2, 5, 12, 20]),
        constrained=st.sampled_from([False, False, True]),
        stop=st.sampled_from([None, None, (4, 5), (6, 3), (3, 2)]),
        logprobs=st.sampled_from([None, None, None, 0]),
        late=st.booleans(),
    )
    def add(
        self,
        adapter: str | None,
        prompt: list[int],
        max_tokens: int,
        constrained: bool,
        stop: tuple[int, int] | None,
        logprobs: int | None,
        late: bool,
    ) -> None:
        sim = self.sim
        request = sim.add(
            adapter, prompt=prompt, max_tokens=max_tokens, constrained=constrained, logprobs=logprobs
        )
        sim.read(request, stop, late=late)
        sim.take_events()

    @precondition(lambda self: self.sim.core.requests)
    @rule(which=st.integers(0, 100))
    def abort(self, which: int) -> None:
        requests = list(self.sim.core.requests.values())
        self.sim.core.end(requests[which % len(requests)], "abort", self.sim.now)
        self.sim.take_events()

    @rule(name=st.sampled_from(NAMES[1:]))
    def replace(self, name: str) -> None:
        self.sim.register(name)

    @rule(count=st.integers(1, 6), steps=st.integers(1, 8))
    def step(self, count: int, steps: int) -> None:
        sim = self.sim
        for _ in range(count):
            while sim.loads:
                sim.finish_load()
            while sim.copies:
                sim.finish_copy()
            if sim.batch is None:
                sim.schedule()
            else:
                sim.now += 0.25
                sim.finish_step(0.25, steps=steps)

    @invariant()
    def holds(self) -> None:
        self.sim.core.check()
        for reader in self.sim.readers.values():
            self.sim.check_reader(reader)

    def teardown(self) -> None:
        sim = self.sim
        if sim.batch is not None:
            sim.finish_step()
        sim.run(steps=2000)
        for reader in sim.readers.values():
            sim.check_reader(reader)
        sim.check_events()
        assert sim.core.blocks.num_free == sim.core.blocks.num_blocks


RowMachine.TestCase.settings = settings(
    max_examples=int(os.environ.get("AIOENGINE_FUZZ_RUNS", "100")),  # make fuzz runs more
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestRowMachine = RowMachine.TestCase


def told(seed: int, steps: int) -> list[Any]:
    """Everything that is told of random requests, whose steps are taken up to ``steps`` at once."""
    rng = random.Random(seed)
    limits = LIMITS._replace(num_blocks=60, prefix_caching=seed % 2 == 0)
    sim = RowSim(limits, next_token=model, repeats=True)
    for name in NAMES[1:]:
        sim.register(str(name))
    due = 0.0
    for _ in range(30):
        due += rng.choice([0.0, 0.5, 3.0, 10.0])
        while sim.now < due:
            while sim.loads:
                sim.finish_load()
            while sim.copies:
                sim.finish_copy()
            batch = sim.schedule()
            sim.now += 0.25
            if batch is not None:
                moves = sim.loads or sim.copies  # they end before the next step
                sim.batch = batch._replace(until=sim.now if moves else min(batch.until, due))
                sim.finish_step(0.25, steps=steps)
        prompt = [rng.randint(2, 4) for _ in range(rng.randint(1, 20))]
        sim.read(sim.add(rng.choice(NAMES), prompt=prompt, max_tokens=rng.choice([1, 8, 30])))
        sim.take_events()
    sim.run(step_seconds=0.25)
    kinds = (events.FirstToken, events.RequestAdmitted, events.RequestEnded)
    found: list[Any] = [(type(e).__name__, e.time, e.request_id) for e in sim.events if isinstance(e, kinds)]
    found += [(e.worst_gap, e.output_tokens) for e in sim.of(events.RequestEnded)]
    return [*found, sim.core.step, [(reader.tokens, reader.reason) for reader in sim.readers.values()]]


@pytest.mark.parametrize("seed", range(6))
def test_several_steps_at_once_are_told_as_one_by_one(seed: int) -> None:
    one_by_one = told(seed, 1)
    assert told(seed, 3) == one_by_one
    assert told(seed, 8) == one_by_one
