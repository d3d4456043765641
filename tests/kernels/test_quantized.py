"""Linears with int8 weights: against the plain definition, at every instruction set that runs here."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.rotated_weights import rotate, round_rows
from torch import Tensor

from aioengine.kernels.cpu import build, shared_library
from aioengine.kernels.cpu.int4 import Int4Weight
from aioengine.kernels.cpu.quantized import QuantizedWeight
from aioengine.kernels.cpu.structs import Kind, Matrix

pytestmark = pytest.mark.skipif(build.shutil.which("c++") is None, reason="needs a C++ compiler")
DTYPES = [torch.float32, torch.bfloat16]
LEVELS = sorted({next(iter(build.levels())), "generic"})
THREADS = 2
FORMS = [QuantizedWeight, Int4Weight]


def inputs(rows: int, n: int, k: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, w, b = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((rows, k), (n, k), (n,)))
    x[:, k // 3] *= 50  # as activations have it: a feature that is much larger than the others
    return x, w, b


def quantize(
    weight: Tensor, *, int8_activations: bool, form: type[QuantizedWeight] = QuantizedWeight
) -> QuantizedWeight:
    memory = torch.empty(form.packed_bytes(*weight.shape), dtype=torch.uint8)
    return form.pack(weight, memory, int8_activations=int8_activations)


def int8_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, block: int, int8_activations: bool
) -> Tensor:
    """``x W^T + bias`` with W in int8, and x too if ``int8_activations``: [T, k], [n, k], [n] -> [T, n]."""
    q, scale = round_rows(rotate(weight, block))
    rows = rotate(x, block)
    if int8_activations:
        q_rows, row_scale = round_rows(rows)
        y = (q_rows.double() @ q.double().T).float() * row_scale * scale.T
    else:
        y = rows @ (q.float() * scale).T
    return (y if bias is None else y + bias.float()).to(x.dtype)


def linear(
    lib: ctypes.CDLL, x: Tensor, weight: Tensor, bias: Tensor | None, *, block: int, int8: bool
) -> Tensor:
    """Packs, multiplies into memory full of NaN, and checks that nothing else was written."""
    (rows, k), n, bf16 = x.shape, len(weight), int(x.dtype == torch.bfloat16)
    packed, scale = torch.empty(n * k, dtype=torch.int8), torch.empty(n)
    start = torch.empty(n, dtype=torch.int32) if int8 else None
    start_at = None if start is None else start.data_ptr()
    lib.aio_quantize(
        *(bf16, weight.data_ptr(), packed.data_ptr(), scale.data_ptr(), start_at, n, k, block, THREADS)
    )
    y = torch.full((rows + 1, n), math.nan, dtype=x.dtype)
    matrix = Matrix(packed=packed.data_ptr(), n=n, k=k, kind=Kind.INT8, rotation=block)
    matrix.bias = None if bias is None else bias.data_ptr()
    matrix.scale, matrix.start = scale.data_ptr(), start_at
    lib.aio_product(bf16, ctypes.byref(matrix), x.data_ptr(), y.data_ptr(), rows, None, 0, THREADS)
    assert y[rows].isnan().all(), "nothing may be written beyond the last row"
    return y[:rows]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@given(
    rows=st.integers(1, 70),
    panels=st.integers(1, 7),
    width=st.integers(1, 40),
    block=st.sampled_from([0, 16, 32, 64, 128]),
    bias=st.booleans(),
    int8=st.booleans(),
)
@pytest.mark.slow
def test_it_is_the_reference(
    level: str, dtype: torch.dtype, rows: int, panels: int, width: int, block: int, bias: bool, int8: bool
) -> None:
    block = block if int8 else 0  # rotated weights want rotated activations
    k = width * max(16, block)
    x, w, b = inputs(rows, panels * 16, k, dtype, seed=rows * 1000 + k)
    given_bias = b if bias else None
    found = linear(shared_library.load(level), x, w, given_bias, block=block, int8=int8)
    expected = int8_linear(x.float(), w.float(), given_bias, block=block, int8_activations=int8)
    assert found.dtype == dtype
    one_off = (x.float().norm(dim=1, keepdim=True) * w.float().norm(dim=1)).max() / 127
    tolerance = float(one_off) * (0.02 if dtype == torch.float32 else 0.1)
    allowed = tolerance + 0.01 * expected.abs() + of_ties(x, w, block=block, int8=int8)
    assert ((found.float() - expected).abs() <= allowed).all()


def of_ties(x: Tensor, w: Tensor, *, block: int, int8: bool) -> Tensor:
    """[rows, n]: what it may come to that a value halfway between two whole numbers is rounded either way."""

    def ties(q: Tensor, scale: Tensor) -> Tensor:
        return ((q / scale).frac().abs() - 0.5).abs() < 1e-3

    rows, weights = rotate(x, block), rotate(w, block)
    row_scale, scale = (round_rows(values)[1] for values in (rows, weights))
    slack = rows.abs() @ (ties(weights, scale) * scale).T
    return slack + (ties(rows, row_scale) * row_scale) @ weights.abs().T if int8 else slack


@pytest.mark.parametrize("int8", [False, True])
def test_it_is_close_to_the_linear_itself(int8: bool) -> None:
    x, w, b = inputs(40, 96, 576, torch.bfloat16)
    true = x.double() @ w.double().T + b.double()
    found = quantize(w, int8_activations=int8).linear(x, b).double()
    assert (found - true).norm() < 0.02 * true.norm()
    if int8:  # which it would not be without the rotation, for the large feature
        plain = linear(shared_library.load(), x, w, b, block=0, int8=True).double()
        assert (found - true).norm() < 0.5 * (plain - true).norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("k", [48, 64, 96, 576])
def test_rows_are_the_weight_in_effect(dtype: torch.dtype, int8: bool, k: int) -> None:
    """A product with them is that of the quantized weight: what DoRA's norms are taken of."""
    x, w, _ = inputs(5, 64, k, dtype)
    packed = quantize(w, int8_activations=int8)
    rows = packed.rows(0, 64)
    assert rows.dtype == dtype
    largest = w.float().abs().amax(1, keepdim=True)
    assert ((rows.float() - w.float()).abs() <= largest / 40).all()
    assert torch.equal(packed.rows(17, 23), rows[17:23])
    assert torch.equal(packed.gather(torch.tensor([63, 0, 5])), rows[[63, 0, 5]])
    expected = x.double() @ rows.double().T
    found = packed.linear(x, None).double()
    assert (found - expected).norm() < (0.02 if int8 or dtype == torch.bfloat16 else 1e-5) * expected.norm()


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_stays_so_and_alone(
    form: type[QuantizedWeight], int8: bool, bad: float
) -> None:
    x, w, _ = inputs(9, 32, 64, torch.bfloat16)
    packed = quantize(w, int8_activations=int8, form=form)
    clean = packed.linear(x, None)
    x[4, 7] = bad
    found = packed.linear(x, None)
    others = [row for row in range(9) if row != 4]
    assert not found[4].isfinite().any()
    assert torch.equal(found[others], clean[others])


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize(("form", "close"), [(QuantizedWeight, 0.02), (Int4Weight, 0.05)])
@pytest.mark.parametrize("int8", [False, True])
def test_rows_of_zeros_and_weights_of_zeros(form: type[QuantizedWeight], close: float, int8: bool) -> None:
    x, w, expected = torch.zeros(3, 64), torch.zeros(16, 64), torch.zeros(3, 16)
    w[1, 5], x[2, 5], expected[2, 1] = 3.0, 2.0, 6.0
    found = quantize(w, int8_activations=int8, form=form).linear(x, None)
    torch.testing.assert_close(found, expected, rtol=close, atol=close)
