"""What several requests share is computed once, also if they come at the same time."""

from __future__ import annotations

import random

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from support.paced_sim import MACHINES, TARGET, Machine, PacedSim

SETTINGS = settings(max_examples=20, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])


@SETTINGS
@given(
    machine=MACHINES,
    target=st.sampled_from([None, TARGET]),
    length=st.integers(1, 1200),
    own=st.integers(0, 100),
    choices=st.integers(2, 40),
    blocks=st.sampled_from([100, 400, 6000]),
    together=st.booleans(),
)
@pytest.mark.slow
def test_a_prompt_is_computed_once_for_all_choices(
    machine: Machine,
    target: float | None,
    length: int,
    own: int,
    choices: int,
    blocks: int,
    together: bool,
) -> None:
    """Each may have a few tokens of its own at the end. They come together, or one step after the other."""
    sim = PacedSim(machine, max_step_seconds=target, num_blocks=blocks)
    shared = [7] * length
    for choice in range(choices):
        sim.add(prompt=shared + [100 + choice] * own, max_tokens=1)
        if not together:
            sim.one_step()
    while sim.core.requests:
        assert sim.one_step() is not None
        sim.core.check()
    computed = sum(len(work.tokens) for batch in sim.batches for work in batch.sequences)
    # Up to four blocks are not waited for, and the last one is computed by each.
    assert computed <= length + choices * (own + 5 * 16)


@SETTINGS
@given(
    machine=MACHINES,
    target=st.sampled_from([None, TARGET]),
    seed=st.integers(0, 2**32 - 1),
    blocks=st.integers(60, 400),
)
@pytest.mark.slow
def test_all_end_with_the_same_outputs(
    machine: Machine, target: float | None, seed: int, blocks: int
) -> None:
    """Prompts that begin alike in all ways, some of them cut off or with their log-probabilities."""
    outputs = []
    for caching in (True, False):
        rng = random.Random(seed)
        bounds = {"max_step_seconds": target, "num_blocks": blocks}
        sim = PacedSim(machine, prefix_caching=caching, **bounds)
        begins = [[rng.randrange(50)] * rng.randint(1, 400) for _ in range(3)]
        sent = []
        for _ in range(20):
            prompt = rng.choice(begins)[: rng.randint(1, 400)] + [rng.randrange(3)] * rng.randint(0, 200)
            sent.append(sim.add(prompt=prompt, max_tokens=rng.randint(1, 5)))
            for _ in range(rng.randint(0, 2)):
                sim.one_step()
        while sim.core.requests:
            assert sim.one_step() is not None
            sim.core.check()
        outputs.append([request.tokens for request in sent])
    assert outputs[0] == outputs[1]
