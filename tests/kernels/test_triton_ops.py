"""The Triton kernels of adapters with small blocks, so that small batches have several of everything: tiles,
rank blocks, column blocks, parts of split inputs. ``test_lora_ops.py`` has the sizes that are chosen.

In Triton's interpreter, by way of ``test_triton.py``, or on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.lora_cases import Case, apply, make_case
from support.triton_here import DEVICE, needs_triton
from torch import Tensor

from aioengine.kernels.portable import plain as reference
from aioengine.kernels.triton.plan import TilePlan
from aioengine.kernels.triton.table import ExpandConfig, ShrinkConfig

lora = pytest.importorskip("aioengine.kernels.triton.lora")
pytestmark = [needs_triton, pytest.mark.usefixtures("poisoned_memory")]

MIXED = [(-1, 3), (0, 1), (1, 5), (3, 37), (4, 2)]
"""Base tokens, a single token, a few, several tiles; slot 2 is not used."""
BRIEF = [(-1, 2), (0, 1), (3, 18)]
"""For what takes many programs: base tokens, a single token, two tiles."""

SHRINK = ShrinkConfig(block_m=16, block_r=16, block_k=16, split_k=1, num_warps=4, num_stages=2)
EXPAND = ExpandConfig(block_m=16, block_n=16, block_r=16, num_warps=4, num_stages=2)


def run(case: Case, shrink: ShrinkConfig = SHRINK, expand: ExpandConfig = EXPAND) -> Sequence[Tensor]:
    """h, and y after shrink, expand and affine."""
    case = case.on(DEVICE)
    batch, pool = case.batch, case.pool
    h = lora.shrink(case.x, pool, batch, shrink)
    lora.expand(h, pool, case.y, batch, expand)
    lora.lora_affine(case.y, pool, batch)
    assert not batch.derive(TilePlan).arrivals(0).any(), "the next layer counts from zero"
    return h.cpu(), case.y.cpu()


def check(case: Case, found: Sequence[Tensor]) -> None:
    tolerance = 1e-5 if case.x.dtype == torch.float32 else 1e-2
    for value, expected in zip(found, apply(reference, case), strict=True):
        assert value.dtype == expected.dtype
        scale = expected.float().abs().max().clamp(min=1.0) if expected.numel() else 1.0
        torch.testing.assert_close(value / scale, expected / scale, rtol=tolerance, atol=tolerance)


@st.composite
def small_cases(draw: st.DrawFn) -> Case:
    max_rank = draw(st.sampled_from([1, 8, 16, 40]))
    ranks = draw(st.lists(st.integers(1, max_rank), min_size=4, max_size=4))
    counts = st.sampled_from([0, 1, 2, 15, 16, 17, 33])
    sequences = draw(st.lists(st.tuples(st.integers(-1, 3), counts), min_size=1, max_size=5))
    widths = draw(st.sampled_from([(40, 7, 7), (16, 32), (24,)]))
    targeted = draw(st.lists(st.sampled_from(range(len(widths))), min_size=1, unique=True).map(sorted))
    slot_affine = draw(st.just([]) | st.lists(st.booleans(), min_size=4, max_size=4))
    return make_case(
        sequences, ranks, max_rank, n_in=draw(st.sampled_from([5, 16, 70])), widths=widths, targeted=targeted,
        slot_affine=slot_affine, seed=draw(st.integers(0, 1000)),
    )  # fmt: skip


@given(case=small_cases(), split=st.sampled_from([1, 2, 8]), block_r=st.sampled_from([16, 32]))
def test_any_batch_with_small_blocks(case: Case, split: int, block_r: int) -> None:
    check(case, run(case, SHRINK._replace(split_k=split), EXPAND._replace(block_r=block_r)))


@pytest.mark.parametrize(("split", "n_in"), [(2, 70), (4, 200), (8, 16)])
def test_split_inputs_give_equal_bits_every_time(split: int, n_in: int) -> None:
    """Also where some parts are empty, since there are fewer blocks of inputs than parts."""
    case = make_case(BRIEF, [20, 8, 1, 17], 20, n_in=n_in, targeted=(0, 2))
    first = run(case, SHRINK._replace(split_k=split))
    check(case, first)
    assert torch.equal(first[0], run(case, SHRINK._replace(split_k=split))[0])


def test_tile_length_does_not_matter() -> None:
    case = make_case(MIXED, [20, 8, 1, 3, 17], 20)
    first = run(case, SHRINK, EXPAND)
    for length in (32, 64):
        other = run(case, SHRINK._replace(block_m=length), EXPAND._replace(block_m=length))
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_layers_share_a_batch() -> None:
    """The tiles are made once, and what one layer counted does not reach the next."""
    cases = [make_case(BRIEF, [20, 8, 1, 17], 20, n_in=n_in, seed=n_in) for n_in in (70, 33, 120)]
    batch = cases[0].on(DEVICE).batch
    for case in cases:
        there = case.on(DEVICE)
        h = lora.shrink(there.x, there.pool, batch, SHRINK._replace(split_k=4))
        lora.expand(h, there.pool, there.y, batch, EXPAND)
        check(case, (h.cpu(), there.y.cpu()))
    plan = batch.derive(TilePlan)
    assert plan.tiles(16) is plan.tiles(16)


def test_more_slices_than_a_launch_takes() -> None:
    case = make_case(
        MIXED, [4, 8, 8, 3, 7], 8, widths=(8, 24, 16, 40, 8), targeted=range(5), slot_affine=[True] * 5
    )
    check(case, run(case))
