"""Where an activated LoRA adapter begins, and which blocks it shares with the base model."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aioengine.core.blocks import BlockManager
from aioengine.core.state import last_occurrence

TOKENS = st.lists(st.sampled_from([0, 1, 0xD800, 0x10FFFF]), max_size=40)


@given(TOKENS, st.lists(st.sampled_from([0, 1, 0xD800]), min_size=1, max_size=4))
def test_the_last_occurrence(tokens: list[int], part: list[int]) -> None:
    starts = [at for at in range(len(tokens)) if tokens[at : at + len(part)] == part]
    assert last_occurrence(tokens, part) == (starts[-1] if starts else None)


@given(st.integers(0, 10), st.integers(0, 6))
def test_blocks_before_the_turn_are_shared_and_no_others(turn: int, known: int) -> None:
    blocks, tokens = BlockManager(8, 2), list(range(13))
    base = blocks.hash_blocks(b"", tokens, [])
    turned = blocks.hash_blocks(b"", tokens, [], turn=turn, rest_key=b"a")
    for index, (one, other) in enumerate(zip(base, turned, strict=True)):
        assert (one == other) == (not turn or index < turn)
    assert blocks.hash_blocks(b"", tokens, turned[:known], turn=turn, rest_key=b"a") == turned
    others = blocks.hash_blocks(b"", tokens, [], turn=turn, rest_key=b"b")
    assert [one == other for one, other in zip(turned, others, strict=True)] == [
        not turn or index < turn for index in range(len(turned))
    ]
