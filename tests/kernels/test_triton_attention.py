"""Attention in Triton where its blocks of keys end: at windows, at parts, and at the tokens' own keys.

In Triton's interpreter, by way of ``test_triton.py``, or on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.layer_cases import LayerCase, close, run
from support.triton_here import DEVICE, needs_triton

from aioengine.kernels import get_backend
from aioengine.kernels.portable import plain as reference

attention = pytest.importorskip("aioengine.kernels.triton.attention")
pytestmark = needs_triton
BLOCK_N = 16
"""Keys at a time; so few that short sequences have blocks of every kind."""


@st.composite
def cases(draw: st.DrawFn) -> LayerCase:
    near = st.builds(
        lambda blocks, off: max(0, BLOCK_N * blocks + off), st.integers(0, 7), st.integers(-2, 2)
    )
    heads, kv_heads = draw(st.sampled_from([(2, 2), (3, 1), (4, 1)]))
    return LayerCase(
        spans=draw(
            st.lists(st.tuples(near, st.integers(1, 3) | near.map(lambda n: n + 1)), min_size=1, max_size=2)
        ),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([16, 24, 32])),
        block_size=draw(st.sampled_from([4, 16])),
        window=draw(st.none() | near.map(lambda n: n + 1)),
        soft_cap=draw(st.sampled_from([None, 3.0])),
        sinks=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        seed=draw(st.integers(0, 1000)),
    )


@given(cases(), st.sampled_from([32, 64]), st.sampled_from([1, 2, 4]))
def test_keys_of_every_block_are_seen_by_those_who_may(case: LayerCase, part: int, splits: int) -> None:
    def config(tiles, *_: int):  # type: ignore[no-untyped-def]
        few = tiles.block_m == attention.FEW_ROWS
        return attention.AttentionConfig(BLOCK_N, splits if few else 1, 4, 2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "PART", part)
        patch.setattr(attention, "attention_config", config)
        found = run(get_backend(DEVICE, "triton"), case, DEVICE)
    close(found, run(reference, case))
