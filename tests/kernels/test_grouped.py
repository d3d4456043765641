"""Weights of 4 or 8 bits in groups: their form in plain torch, against the definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aioengine.kernels import reference
from aioengine.kernels.grouped import GroupedWeight


def make(
    n: int, groups: int, size: int, bits: int, dtype: torch.dtype, *, ordered: bool = False, seed: int = 0
) -> tuple[GroupedWeight, torch.Tensor]:
    """A random weight, and its codes, a byte each."""
    generator = torch.Generator().manual_seed(seed)
    k = groups * size
    codes = torch.randint(0, 2**bits, (n, k), generator=generator).to(torch.uint8)
    scale = torch.rand(n, groups, generator=generator) * 0.1
    offset = torch.randn(n, groups, generator=generator)
    order = torch.randperm(k, generator=generator) if ordered else None
    kept = GroupedWeight.halves(codes) if bits == 4 else codes
    assert bits in (4, 8)
    return GroupedWeight(kept, scale.half(), offset.half(), bits, dtype, order), codes


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 20),
    groups=st.integers(1, 5),
    size=st.sampled_from([2, 16, 32, 64, 128]),
    bits=st.sampled_from([4, 8]),
    ordered=st.booleans(),
)
def test_the_weight_in_effect_is_the_definition(
    n: int, groups: int, size: int, bits: int, ordered: bool
) -> None:
    weight, codes = make(n, groups, size, bits, torch.float32, ordered=ordered)
    found = weight.rows(0, n)
    assert (weight.n, weight.k) == (n, groups * size) == tuple(found.shape)
    order = range(weight.k) if weight.order is None else weight.order.tolist()
    for i in range(n):
        for j, place in enumerate(order):
            g = j // size
            expected = float(weight.scale[i, g]) * int(codes[i, j]) + float(weight.offset[i, g])
            assert float(found[i, place]) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_rows_gather_and_products() -> None:
    weight, _ = make(48, 3, 32, 4, torch.bfloat16, ordered=True)
    rows = weight.rows(0, 48)
    assert rows.dtype == torch.bfloat16
    assert torch.equal(weight.rows(5, 9), rows[5:9])
    assert torch.equal(weight.gather(torch.tensor([47, 0, 3])), rows[[47, 0, 3]])
    x, bias = torch.randn(5, 96).bfloat16(), torch.randn(48).bfloat16()
    expected = x.double() @ rows.double().T + bias.double()
    for found in (weight.linear(x, bias), reference.linear(x, weight, bias)):
        assert (found.double() - expected).norm() < 1e-2 * expected.norm()


def test_its_bytes() -> None:
    four, _ = make(32, 4, 32, 4, torch.bfloat16)
    assert four.nbytes == 32 * 128 // 2 + 2 * 32 * 4 * 2
    eight, _ = make(32, 4, 32, 8, torch.bfloat16, ordered=True)
    assert eight.nbytes == 32 * 128 + 2 * 32 * 4 * 2 + 128 * 8
