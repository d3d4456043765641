"""The prefix cache shares blocks among requests of one adapter content and one salt, and with nobody else."""

from __future__ import annotations

from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from aioengine.testing import LIMITS, Sim


class Sent(NamedTuple):
    adapter: str | None
    salt: str | None
    prompt: list[int]
    replace: bool
    """The adapter gets a new version, with other contents, before."""


# Few tokens, so that prefixes are equal; characters that could make two different pairs look like one.
SENT = st.builds(
    Sent,
    adapter=st.sampled_from([None, "a", "a-1"]),
    salt=st.none() | st.text("01:-a", min_size=1, max_size=3),
    prompt=st.lists(st.integers(2, 3), min_size=1, max_size=17),
    replace=st.booleans(),
)


@given(st.lists(SENT, min_size=2, max_size=20))
def test_all_that_may_be_shared_is_and_nothing_else(requests: list[Sent]) -> None:
    sim = Sim(LIMITS._replace(num_blocks=1000, cpu_capacity=100))
    size = LIMITS.block_size
    known: set[tuple[object, ...]] = set()
    for sent in requests:
        current = sim.core.residency.current
        if sent.adapter is not None and (sent.replace or sent.adapter not in current):
            sim.register(sent.adapter)
        entry = None if sent.adapter is None else current[sent.adapter]
        request = sim.add(sent.adapter, prompt=sent.prompt, max_tokens=1, cache_salt=sent.salt)
        sim.run()
        version = None if entry is None else (entry.label, entry.version)
        blocks = [(version, sent.salt, *sent.prompt[:end]) for end in range(size, len(sent.prompt) + 1, size)]
        usable = blocks[: (len(sent.prompt) - 1) // size]  # one token is always left to compute
        shared = next((i for i, block in enumerate(usable) if block not in known), len(usable))
        assert request.cached_tokens == shared * size
        known.update(blocks)
