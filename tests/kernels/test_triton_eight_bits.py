"""Products in eight bits in Triton, against the rows and weights that the codes stand for, in float64.

In Triton's interpreter, by way of ``test_triton.py``, or on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.triton_here import DEVICE, examples, needs_triton
from torch import Tensor

from aioengine.kernels.blocks import BlockWeight, StackedWeight
from aioengine.kernels.portable.dequantize import codes
from aioengine.kernels.portable.quantize import quantize

blocks = pytest.importorskip("aioengine.kernels.triton.quantized.blocks")
from aioengine.kernels.triton.quantized import eight_bits  # noqa: E402  (only where there is triton)

pytestmark = needs_triton
EXAMPLES = examples(6, 100)
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Of the largest value: that of sums and of the result."""


def weight_of(
    format: str, n: int, k: int, group: int, dtype: torch.dtype, seed: int = 0, *, rounds: bool = True
) -> BlockWeight:
    values = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    made = {name: tensor.to(DEVICE) for name, tensor in quantize(format, values, group).items()}
    return BlockWeight(format, k=k, dtype=dtype, group=group, rounds=rounds, **made)


def rows_of(tokens: int, k: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Rows of very different sizes, with outliers, and one of zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k, generator=generator) * torch.logspace(-3, 1, tokens)[:, None]
    x[:, 3] *= 20
    x[tokens // 2] = 0
    return x.to(dtype).to(DEVICE)


def expanded(format: str, data: Tensor, scales: Tensor) -> Tensor:
    groups = scales.shape[1]
    values = codes(format, data).double().view(len(data), groups, -1)
    return (values * scales.double()[..., None]).flatten(1)


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_rows_that_are_almost_zero(format: str) -> None:
    x = torch.tensor([[1e-30], [1e-36], [1e-37], [1e-39], [1e-45], [0.0]]).repeat(1, 128).to(DEVICE)
    rows = eight_bits.round_rows(x, format, 128)
    values = expanded(format, rows.codes, rows.scales)
    torch.testing.assert_close(values, x.double(), rtol=1e-2, atol=1e-35)


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.data())
def test_rows_and_products(data: st.DataObject) -> None:
    """Rows are as quantizing a weight makes them, and products are those of what the codes stand for."""
    format = data.draw(st.sampled_from(["int8", "fp8"]))
    dtype = data.draw(st.sampled_from(list(ROUNDING)))
    k = data.draw(st.sampled_from([48, 128, 256, 1040]))
    group = data.draw(st.sampled_from([g for g in (128, k) if k % g == 0]))
    n, tokens = data.draw(st.sampled_from([1, 40, 130])), data.draw(st.sampled_from([17, 66]))
    seed = data.draw(st.integers(0, 1000))
    weight = weight_of(format, n, k, group, dtype, seed)
    assert eight_bits.covers(weight, torch.device(DEVICE))
    x = rows_of(tokens, k, dtype, seed)
    rows = eight_bits.round_rows(x, format, group)
    expected = quantize(format, x.float(), group)
    torch.testing.assert_close(rows.scales, expected["scale"], rtol=1e-6, atol=0)
    found, nearest = (expanded(format, d, rows.scales) for d in (rows.codes, expected["data"]))
    assert ((found - nearest).abs() <= (nearest.abs() * 0.13).clamp(min=1.01 * rows.scales.max())).all()
    assert float((rows.codes == expected["data"]).float().mean()) > 0.99
    bias = torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)
    y = x.new_empty(tokens, n)
    eight_bits.multiply(rows, weight, bias, y)
    assert weight.scale is not None
    exact = found @ expanded(format, weight.data, weight.scale).T + bias.double()
    size = exact.abs().amax(1, keepdim=True).clamp(min=1)
    assert float(((y.double() - exact).abs() / size).max()) < ROUNDING[dtype]


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_where_it_is_used(format: str) -> None:
    """For many rows, if the weight allows for it; parts of a fused weight are written beside each other."""
    weights = [weight_of(format, n, 128, 128, torch.float32, n) for n in (24, 40)]
    exact = [weight_of(format, n, 128, 128, torch.float32, n, rounds=False) for n in (24, 40)]
    x = rows_of(20, 128, torch.float32, 0)
    many = blocks.linear(x, StackedWeight(weights), None)
    plain = blocks.linear(x, StackedWeight(exact), None)
    off = (many - plain).norm(dim=1) / plain.norm(dim=1).clamp(min=1e-9)
    assert float(off.max()) < 0.05 and float(off.max()) > 1e-4
    few = [blocks.linear(x[:16], StackedWeight(parts), None) for parts in (weights, exact)]
    assert torch.equal(*few)
    rows = eight_bits.round_rows(x, format, 128)
    alone = x.new_empty(20, 40)
    eight_bits.multiply(rows, weights[1], None, alone)
    assert torch.equal(many[:, 24:], alone)


@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_spoils_no_other(format: str, value: float) -> None:
    weight = weight_of(format, 40, 128, 128, torch.float32)
    x = rows_of(20, 128, torch.float32, 1)
    expected = blocks.linear(x, weight, None)
    x[4, 7] = value
    found = blocks.linear(x, weight, None)
    assert found[4].isnan().all()
    keep = [i for i in range(20) if i != 4]
    assert torch.equal(found[keep], expected[keep])


@pytest.mark.parametrize(
    "weight",
    [
        lambda: weight_of("int8", 32, 128, 128, torch.float32, rounds=False),
        lambda: weight_of("int8", 32, 128, 64, torch.float32),
        lambda: weight_of("int4", 32, 128, 128, torch.float32),
        lambda: weight_of("fp8", 32, 136, 136, torch.float32),
    ],
    ids=["not allowed", "small groups", "four bits", "odd sizes"],
)
def test_what_is_not_covered(weight: object) -> None:
    assert callable(weight) and not eight_bits.covers(weight(), torch.device(DEVICE))
