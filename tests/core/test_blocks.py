from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aioengine.core.blocks import BlockManager


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


@given(known=st.sets(st.integers(0, 11)), tokens=st.integers(0, 40))
def test_what_is_found_is_the_longest_prefix_of_which_all_is_there(known: set[int], tokens: int) -> None:
    blocks = BlockManager(12, 3)
    hashes = blocks.hash_blocks(b"", range(36), [])
    held = blocks.allocate(12)
    for index in known:
        blocks.commit(held[index], hashes[index])
    longest = next((i for i in range(min(tokens // 3, 12)) if i not in known), min(tokens // 3, 12))
    assert blocks.match(hashes, tokens) == held[:longest]
