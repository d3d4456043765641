"""Linears with weights of eight and four bits: against their definitions, at every instruction set here."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.rotated_weights import rotate, round_rows
from torch import Tensor

from aioengine.kernels.cpu import build
from aioengine.kernels.cpu.int4 import Int4Weight
from aioengine.kernels.cpu.quantized import QuantizedWeight

pytestmark = [
    pytest.mark.skipif(build.shutil.which("c++") is None, reason="needs a C++ compiler"),
    pytest.mark.usefixtures("level"),
]
DTYPES = [torch.float32, torch.bfloat16]
Form = type[QuantizedWeight]
every_form = pytest.mark.parametrize("form", [QuantizedWeight, Int4Weight])


def inputs(rows: int, n: int, k: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, w, b = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((rows, k), (n, k), (n,)))
    x[:, k // 3] *= 50  # as activations have it: a feature that is much larger than the others
    w[n // 2] += 3  # and outputs whose weights have one sign
    return x, w, b


def pack(form: Form, weight: Tensor, *, int8: bool) -> QuantizedWeight:
    memory = torch.empty(form.packed_bytes(*weight.shape), dtype=torch.uint8)
    return form.pack(weight, memory, int8_activations=int8)


def unpack(packed: Int4Weight) -> Tensor:
    """[n, k] float32, rotated: what the bytes stand for by the definition in ``src/int4.cpp``."""
    n, k, group = packed.n, packed.k, packed.group
    panels = packed.data.view(n // 16, -1)
    words, steps, lows = panels.split([8 * k, 16 * k // group, 16 * k // group], dim=1)
    byte = words.reshape(-1, k // 8, 16, 4).permute(0, 2, 1, 3)  # [panel, output, word, byte]
    q = torch.stack([byte & 15, byte >> 4], dim=3).reshape(n, k // group, group).float()

    def by_output(values: Tensor) -> Tensor:
        return values.reshape(-1, k // group, 16).transpose(1, 2).reshape(n, -1, 1).float()

    whole = q * by_output(steps) + by_output(lows.contiguous().view(torch.int8))
    assert whole.abs().max() <= 128
    return whole.flatten(1) * packed.scale[:, None] / max(1, packed.rotation) ** 0.5


def ties(values: Tensor, scale: Tensor) -> Tensor:
    """What it comes to if a value halfway between two whole numbers is rounded the other way."""
    return (((values / scale).frac().abs() - 0.5).abs() < 1e-3) * scale


@every_form
@pytest.mark.parametrize("dtype", DTYPES)
@given(
    rows=st.integers(1, 70),
    panels=st.integers(1, 7),
    width=st.integers(1, 40),
    bias=st.booleans(),
    int8=st.booleans(),
)
@pytest.mark.slow
def test_it_is_the_product_with_what_it_stands_for(
    form: Form, dtype: torch.dtype, rows: int, panels: int, width: int, bias: bool, int8: bool
) -> None:
    n, k = panels * 16, width * 16
    x, w, b = inputs(rows, n, k, dtype, seed=rows * 1000 + k)
    packed = pack(form, w, int8=int8)
    turned, slack = rotate(x, packed.rotation), torch.zeros(rows, n)
    if isinstance(packed, Int4Weight):
        weights = unpack(packed)
    else:
        whole, scale = round_rows(rotate(w, packed.rotation))
        weights = whole * scale
        slack += turned.abs() @ ties(rotate(w, packed.rotation), scale).T
    if int8:
        q, scale = round_rows(turned)
        slack += ties(turned, scale) @ weights.abs().T
        turned = q * scale
    expected = turned.double() @ weights.double().T + (b.double() if bias else 0.0)
    found = packed.linear(x, b if bias else None)
    assert found.dtype == dtype and found.shape == (rows, n)
    close = 1e-5 if dtype == torch.float32 else 1e-2
    allowed = close * (turned.norm(dim=1, keepdim=True) * weights.norm(dim=1) + expected.abs()) + slack
    assert ((found.double() - expected).abs() <= allowed).all()
    alone = packed.linear(x[-1:], b if bias else None)
    assert torch.equal(alone[0], found[-1]), "a row's bits do not depend on its neighbours"


@pytest.mark.parametrize("int8", [False, True])
def test_it_is_close_to_the_linear_itself(int8: bool) -> None:
    x, w, b = inputs(40, 96, 576, torch.bfloat16)
    true = x.double() @ w.double().T + b.double()
    found = pack(QuantizedWeight, w, int8=int8).linear(x, b).double()
    assert (found - true).norm() < 0.02 * true.norm()
    if int8:  # which it would not be without the rotation, for the large feature
        (q, scale), (of_x, x_scale) = round_rows(w.float()), round_rows(x.float())
        plain = (of_x.double() @ q.double().T) * x_scale * scale.T + b.double()
        assert (found - true).norm() < 0.5 * (plain - true).norm()


@every_form
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("k", [16, 48, 96, 576])
def test_rows_are_the_weight_in_effect(form: Form, dtype: torch.dtype, int8: bool, k: int) -> None:
    """A product with them is that of the quantized weight: what DoRA's norms are taken of."""
    x, w, _ = inputs(5, 64, k, dtype)
    packed = pack(form, w, int8=int8)
    rows = packed.rows(0, 64)
    assert rows.dtype == dtype
    close = 1e-2 if dtype == torch.bfloat16 else 1e-5
    if isinstance(packed, Int4Weight):
        stored = rotate(unpack(packed), packed.rotation)
        assert (rows.float() - stored).norm() < close * stored.norm()
    else:
        largest, off = w.float().abs().amax(1, keepdim=True), (rows.float() - w.float()).abs()
        assert (off <= largest / (40 if packed.rotation == 0 else 25)).all()
    assert torch.equal(packed.rows(17, 23), rows[17:23])
    assert torch.equal(packed.gather(torch.tensor([63, 0, 5])), rows[[63, 0, 5]])
    expected = x.double() @ rows.double().T
    found = packed.linear(x, None).double()
    assert (found - expected).norm() < (0.02 if int8 or dtype == torch.bfloat16 else 1e-5) * expected.norm()


@pytest.mark.parametrize("int8", [False, True])
def test_it_is_nearer_than_q4_0_in_as_many_bytes(int8: bool) -> None:
    """llama.cpp's Q4_0: 32 weights share a scale of 16 bits, which is the largest of them by -8."""
    _, w, _ = inputs(1, 96, 576, torch.float32)
    packed = pack(Int4Weight, w, int8=int8)
    groups = w.view(96, -1, 32)
    scale = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / -8
    q4_0 = ((groups / scale + 8.5).floor().clamp(0, 15) - 8) * scale
    ours, theirs = ((found.reshape(w.shape) - w)[:48].norm() for found in (packed.rows(0, 96), q4_0))
    assert ours < 0.87 * theirs
    assert packed.data.nbytes == 96 * (576 // 32) * 18


def test_a_group_that_four_bits_can_hold_is_held() -> None:
    """Whole numbers of 0 to 15 times a step, and a low, which nothing is lost of."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(0, 16, (32, 4, 32), generator=generator).float()
    q[..., 0], q[..., 1] = 0, 15
    step = torch.randint(1, 17, (32, 4, 1), generator=generator)
    step[:, 0] = 16  # the widest group of a row, which its scale is made for
    w = ((q * step - 15 * step // 2) / 16).flatten(1)
    packed = pack(Int4Weight, w, int8=False)
    assert (packed.rows(0, 32) - w).abs().max() < 1e-5


@every_form
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_stays_so_and_alone(form: Form, int8: bool, bad: float) -> None:
    x, w, _ = inputs(9, 32, 64, torch.bfloat16)
    packed = pack(form, w, int8=int8)
    clean = packed.linear(x, None)
    x[4, 7] = bad
    found = packed.linear(x, None)
    others = [row for row in range(9) if row != 4]
    assert not found[4].isfinite().any()
    assert torch.equal(found[others], clean[others])


@every_form
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_stays_in_its_output(form: Form, int8: bool, bad: float) -> None:
    x, w, _ = inputs(9, 32, 64, torch.bfloat16)
    clean = pack(form, w, int8=int8).linear(x, None)
    w[3, 7] = bad
    found = pack(form, w, int8=int8).linear(x, None)
    assert not found[:, 3].isfinite().any()
    assert torch.equal(found[:, 4:], clean[:, 4:])


@pytest.mark.parametrize(("form", "close"), [(QuantizedWeight, 0.02), (Int4Weight, 0.05)])
@pytest.mark.parametrize("int8", [False, True])
def test_rows_of_zeros_and_weights_of_zeros(form: Form, close: float, int8: bool) -> None:
    x, w, expected = torch.zeros(3, 64), torch.zeros(16, 64), torch.zeros(3, 16)
    w[1, 5], x[2, 5], expected[2, 1] = 3.0, 2.0, 6.0
    found = pack(form, w, int8=int8).linear(x, None)
    torch.testing.assert_close(found, expected, rtol=close, atol=close)
