"""Plain weights as codes and scales: how far they may be off, for any values."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from aioengine.kernels.blocks import BlockWeight
from aioengine.kernels.portable.quantize import quantize


def expanded(format: str, values: Tensor, group: int) -> Tensor:
    made = quantize(format, values, group)
    weight = BlockWeight(format, k=values.shape[1], dtype=torch.float32, group=group, **made)
    return weight.rows(0, weight.n)


@given(
    format=st.sampled_from(["int8", "fp8", "int4"]),
    group=st.sampled_from([8, 16, 32, 64]),
    groups=st.integers(1, 4),
    size=st.sampled_from([1e-6, 1.0, 3e4]),
    shift=st.sampled_from([0.0, 2.0, -5.0]),
    tail=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_each_value_is_off_by_a_part_of_its_groups_largest(
    format: str, group: int, groups: int, size: float, shift: float, tail: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(6, group * groups, generator=generator) + shift
    if tail:
        values = values**3
    values = values * size
    values[2] = 0
    found = expanded(format, values, group)
    assert found.isfinite().all() and (found[2] == 0).all()
    by_group = values.view(6, groups, group)
    off = (found - values).abs().view(by_group.shape)
    largest = by_group.abs().amax(-1, keepdim=True)
    if format == "int8":
        assert (off <= largest / 127 * 0.501).all()
    elif format == "fp8":  # three bits behind the first one, and fixed steps below 2^-6
        assert (off <= (by_group.abs() * 2**-4).maximum(largest / 448 * 2**-10) * 1.001).all()
    else:
        span = by_group.amax(-1).clamp(min=0) - by_group.amin(-1).clamp(max=0)
        rounded = (span / 15)[..., None] * 1.01  # the zero point is rounded, too
        assert (off.square().sum(-1) <= rounded.square().sum(-1) * group).all()


def test_rows_do_not_depend_on_each_other() -> None:
    """So ranks, and pieces of a weight that is loaded, have parts of the same weight."""
    values = torch.randn(9, 128, generator=torch.Generator().manual_seed(0))
    for format, group in (("int8", 128), ("fp8", 128), ("int4", 32)):
        whole = quantize(format, values, group)
        for name, tensor in quantize(format, values[3:5], group).items():
            assert tensor.equal(whole[name][3:5])
