from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.device_memory import DeviceMemory
from support.full_sim import FullSim

from aioengine import events
from aioengine.core.blocks import BlockManager
from aioengine.step import most_blocks
from aioengine.testing import LIMITS


@pytest.mark.parametrize("caching", [True, False])
def test_allocate_and_release_are_a_pair(caching: bool) -> None:
    blocks = BlockManager(4, 2, prefix_caching=caching)
    held = blocks.allocate(3)
    assert len(set(held)) == 3
    assert blocks.num_free == 1
    assert not blocks.can_allocate(2)
    blocks.release(held)
    assert blocks.num_free == 4
    with pytest.raises(AssertionError, match="released twice"):
        blocks.release(held)


def test_a_committed_prefix_is_found_and_shared() -> None:
    blocks = BlockManager(8, 2)
    tokens = [1, 2, 3, 4, 5]
    hashes = blocks.hash_blocks(b"a", tokens, [])
    assert len(hashes) == 2, "only full blocks have an identity"
    held = blocks.allocate(3)
    for block, digest in zip(held, hashes, strict=False):
        blocks.commit(block, digest)
    assert blocks.match(hashes, 5) == held[:2]
    assert blocks.match(hashes, 3) == held[:1], "never more tokens than asked for"
    again = blocks.allocate(1, held[:2])
    assert again[:2] == held[:2]
    blocks.release(held)
    assert blocks.match(hashes, 5) == held[:2], "still referenced by the second holder"
    blocks.release(again)
    assert blocks.match(hashes, 5) == held[:2], "free blocks keep their contents"
    blocks.allocate(8)
    assert blocks.match(hashes, 5) == [], "reused blocks are forgotten"


def test_blocks_behind_a_window_are_given_back_once() -> None:
    """A sequence of any length holds a bounded number of blocks, and the prefix cache keeps the others."""
    limits = LIMITS._replace(window=6, num_blocks=14)
    sim = FullSim(limits, memory=DeviceMemory)
    request = sim.add(prompt=list(range(2, 42)), max_tokens=20)
    most = 0
    while sim.core.requests:
        sim.settle()
        most = max(most, len(request.held))
    bound = most_blocks(limits.max_model_len, limits.block_size, limits.max_num_batched_tokens, limits.window)
    assert 6 <= most <= bound == 8
    assert sim.core.blocks.num_free == 14


def test_a_prompt_is_found_though_blocks_behind_its_window_are_gone() -> None:
    """They are the first to be reused, since they were given back first."""
    sim = FullSim(LIMITS._replace(window=6, num_blocks=14), memory=DeviceMemory)
    prompt = list(range(2, 42))
    sim.add(prompt=prompt, max_tokens=1)
    sim.run()
    sim.add(prompt=list(range(50, 78)), max_tokens=1)
    sim.run()
    blocks = sim.core.blocks
    hashes = blocks.hash_blocks(b"0:", prompt, [])
    assert len(blocks.match(hashes[:2], 8)) < 2, "the second block is gone, or the test shows nothing"
    again = sim.add(prompt=prompt, max_tokens=9)
    sim.schedule()
    assert again.computed == 36
    sim.finish_step()
    sim.run()


@given(
    known=st.sets(st.integers(0, 11)),
    window=st.one_of(st.none(), st.integers(1, 30)),
    tokens=st.integers(0, 40),
)
def test_what_is_found_is_the_longest_prefix_of_which_all_is_there_that_is_seen(
    known: set[int], window: int | None, tokens: int
) -> None:
    blocks = BlockManager(12, 3, window=window)
    hashes = blocks.hash_blocks(b"", range(36), [])
    held = blocks.allocate(12)
    for index in known:
        blocks.commit(held[index], hashes[index])
    longest = max(
        length
        for length in range(min(tokens // 3, 12) + 1)
        if all(i in known for i in range(length) if i == 0 or window is None or i > blocks.unseen(3 * length))
    )
    found = blocks.match(hashes, tokens)
    assert found == [held[i] if i in known else held[0] for i in range(longest)]
    if window is not None and longest:  # the next token sees its own position and those before it
        first = max(0, 3 * longest + 1 - window) // 3
        assert all(i in known for i in range(first, longest))


def test_a_request_that_is_preempted_behind_its_window_starts_again() -> None:
    """Two requests that hold up to 7 blocks each, in a pool of 11."""
    sim = FullSim(LIMITS._replace(window=20, num_blocks=11), memory=DeviceMemory)
    for first in (2, 3):
        sim.add(prompt=list(range(first, first + 6)), max_tokens=50)
    sim.run()
    assert set(sim.ended.values()) == {"length"}
    assert sim.of(events.RequestPreempted), "or the pool is too large for the test"
