"""The Triton kernels against plain torch: in Triton's interpreter (TRITON_INTERPRET=1), or on a GPU.

The interpreter is chosen when triton is imported, for the whole process, so on a machine without a GPU
``test_triton.py`` runs this file in a process of its own. Blocks are small here, so that small batches have
several of everything: tiles, rank blocks, column blocks, parts of split inputs.
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

from aioengine.kernels import LoRABatch
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


def on_device(case: Case) -> Case:
    return case._replace(
        x=case.x.to(DEVICE),
        a=case.a.to(DEVICE),
        b=[b.to(DEVICE) for b in case.b],
        affine=[affine.to(DEVICE) for affine in case.affine],
        y=case.y.to(DEVICE),
    )


def batch_of(case: Case) -> LoRABatch:
    slots, counts = zip(*case.sequences, strict=True)
    return LoRABatch(slots, counts, case.ranks, DEVICE, slot_affine=case.slot_affine)


def run(
    case: Case,
    shrink: ShrinkConfig | None = None,
    expand: ExpandConfig | None = None,
    *,
    int8: bool = False,
) -> Sequence[Tensor]:
    """h, and y after shrink, expand and affine."""
    case, batch = on_device(case), batch_of(case)
    y, pool = case.y.clone(), case.int8_pool if int8 else case.pool
    h = lora.shrink(case.x, pool, batch, shrink) if shrink else lora.lora_shrink(case.x, pool, batch)
    if expand:
        lora.expand(h, pool, y, batch, expand)
    else:
        lora.lora_expand(h, pool, y, batch)
    lora.lora_affine(y, pool, batch)
    assert not batch.derive(TilePlan).arrivals(0).any(), "the next layer counts from zero"
    return h.cpu(), y.cpu()


def check(case: Case, found: Sequence[Tensor], *, int8: bool = False) -> None:
    tolerance = 1e-5 if case.x.dtype == torch.float32 else 1e-2
    for value, expected in zip(found, apply(reference, case, int8=int8), strict=True):
        assert value.dtype == expected.dtype
        scale = expected.float().abs().max().clamp(min=1.0) if expected.numel() else 1.0
        torch.testing.assert_close(value / scale, expected / scale, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("max_rank", "ranks"), [(1, [1, 1, 1, 1, 1]), (64, [64, 8, 9, 33, 1])])
def test_default_configurations(dtype: torch.dtype, max_rank: int, ranks: list[int]) -> None:
    affine = [True, False, True, True, False]
    case = make_case(MIXED, ranks, max_rank, n_in=48, dtype=dtype, slot_affine=affine)
    check(case, run(case))
    decode = make_case([(-1, 1), (1, 2), (4, 16)], ranks, max_rank, n_in=48, dtype=dtype, slot_affine=affine)
    check(decode, run(decode))


@pytest.mark.parametrize("max_rank", [320, 512])
def test_ranks_of_many_blocks(max_rank: int) -> None:
    case = make_case([(-1, 1), (0, 2), (1, 18)], [max_rank, 100], max_rank, n_in=32, targeted=(0, 2))
    check(case, run(case))


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
    batch = batch_of(cases[0])
    for case in cases:
        moved = on_device(case)
        h = lora.shrink(moved.x, moved.pool, batch, SHRINK._replace(split_k=4))
        y = moved.y.clone()
        lora.expand(h, moved.pool, y, batch, EXPAND)
        check(case, (h.cpu(), y.cpu()))
    plan = batch.derive(TilePlan)
    assert plan.tiles(16) is plan.tiles(16)


def test_more_slices_than_a_launch_takes() -> None:
    case = make_case(
        MIXED, [4, 8, 8, 3, 7], 8, widths=(8, 24, 16, 40, 8), targeted=range(5), slot_affine=[True] * 5
    )
    check(case, run(case, SHRINK, EXPAND))


def test_a_pool_in_lower_precision_than_the_activations() -> None:
    case = make_case(MIXED, [4, 8, 8, 3, 7], 8, slot_affine=[True] * 5)
    low = case._replace(
        a=case.a.bfloat16(), b=[b.bfloat16() for b in case.b], affine=[w.bfloat16() for w in case.affine]
    )
    wide = low._replace(a=low.a.float(), b=[b.float() for b in low.b], affine=[w.float() for w in low.affine])
    check(wide, run(low))


def test_only_the_tokens_and_columns_of_adapters_change() -> None:
    case = make_case(MIXED, [4, 8, 8, 3, 7], 8, targeted=(0, 2), slot_affine=[True, False, False, True, True])
    h, y = run(case)
    assert torch.equal(y[:3], case.y[:3])
    assert torch.equal(y[:, 32:48], case.y[:, 32:48])
    assert (y[3:, :32] != case.y[3:, :32]).all()
    assert not h[:3].any()
    start = 3
    for (slot, count), (_, rank) in zip(MIXED[1:], [(0, 4), (1, 8), (3, 3), (4, 7)], strict=True):
        assert not h[start : start + count, :, rank:].any(), f"slot {slot}"
        start += count


def test_a_token_that_is_not_finite_stays_alone() -> None:
    case = make_case(BRIEF, [4, 8, 8, 3], 8, slot_affine=[True] * 4)
    clean = run(case)
    for token in (0, 2, 5, 20):
        x = case.x.clone()
        x[token] = float("nan")
        h, y = run(case._replace(x=x), SHRINK._replace(split_k=2))
        others = [t for t in range(len(x)) if t != token]
        torch.testing.assert_close(y[others], clean[1][others])
        assert y[token].isnan().all() == (token >= 2)
        assert not h[2, :, 4:].any()  # zero beyond the rank, even there


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("split_k", [1, 3])
def test_int8_adapters(dtype: torch.dtype, split_k: int) -> None:
    case = make_case(
        BRIEF,
        [33, 8, 9, 64],
        64,
        n_in=48,
        targeted=(0, 2),
        dtype=dtype,
        slot_affine=[True, False, True, True],
    )
    check(case, run(case, SHRINK._replace(split_k=split_k), EXPAND, int8=True), int8=True)
    outer = make_case(MIXED, [64, 8, 9, 33, 1], 64, n_in=31, targeted=(0,), dtype=dtype)
    ids = torch.arange(len(outer.x)) % 31
    found = lora.lora_embed(ids.to(DEVICE), on_device(outer).int8_pool, batch_of(outer))
    expected = reference.lora_embed(ids, outer.int8_pool, outer.batch)
    torch.testing.assert_close(found.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding(dtype: torch.dtype) -> None:
    case = make_case(MIXED, [70, 8, 1, 3, 17], 70, n_in=31, targeted=(0,), dtype=dtype)
    ids = torch.arange(len(case.x)) % 31
    expected = reference.lora_embed(ids, case.pool, case.batch)
    found = lora.lora_embed(ids.to(DEVICE), on_device(case).pool, batch_of(case))
    assert torch.equal(found.cpu(), expected)


def test_scales() -> None:
    """What each token's adapter adds is multiplied."""
    case = make_case([(0, 20), (1, 2), (2, 1)], [5, 16, 3], 16)
    slots, counts, scales = [-1, 0, 1, 1], [3, 2, 1, 17], [0.5, -2.0, 1.0, 0.7]
    results = []
    for backend, here, where in ((lora, on_device(case), DEVICE), (reference, case, "cpu")):
        y, batch = here.y.clone(), LoRABatch(slots, counts, case.ranks, where, scales=scales)
        backend.lora_expand(backend.lora_shrink(here.x, here.pool, batch), here.pool, y, batch)
        tokens = torch.arange(len(y), device=where) % case.a.shape[2]
        results.append([y.cpu(), backend.lora_embed(tokens, here.pool, batch).cpu()])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
