"""Linears with weights of four bits: against their definition, at every instruction set that runs here."""

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

pytestmark = [
    pytest.mark.skipif(build.shutil.which("c++") is None, reason="needs a C++ compiler"),
    pytest.mark.usefixtures("level"),
]
DTYPES = [torch.float32, torch.bfloat16]


def inputs(rows: int, n: int, k: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, w, b = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((rows, k), (n, k), (n,)))
    x[:, k // 3] *= 50  # as activations have it: a feature that is much larger than the others
    w[n // 2] += 3  # and outputs whose weights have one sign
    return x, w, b


def pack(weight: Tensor, *, int8: bool) -> Int4Weight:
    memory = torch.empty(Int4Weight.packed_bytes(*weight.shape), dtype=torch.uint8)
    return Int4Weight.pack(weight, memory, int8_activations=int8)


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
    dtype: torch.dtype, rows: int, panels: int, width: int, bias: bool, int8: bool
) -> None:
    n, k = panels * 16, width * 16
    x, w, b = inputs(rows, n, k, dtype, seed=rows * 1000 + k)
    packed = pack(w, int8=int8)
    weights, turned = unpack(packed), rotate(x, packed.rotation)
    slack = torch.zeros(rows, n)
    if int8:
        q, scale = round_rows(turned)
        # A value halfway between two whole numbers may be rounded either way.
        tie = ((turned / scale).frac().abs() - 0.5).abs() < 1e-3
        slack = (tie * scale) @ weights.abs().T
        turned = q * scale
    expected = turned.double() @ weights.double().T + (b.double() if bias else 0.0)
    found = packed.linear(x, b if bias else None)
    assert found.dtype == dtype and found.shape == (rows, n)
    close = 1e-5 if dtype == torch.float32 else 1e-2
    allowed = close * (turned.norm(dim=1, keepdim=True) * weights.norm(dim=1) + expected.abs()) + slack
    assert ((found.double() - expected).abs() <= allowed).all()
    alone = packed.linear(x[-1:], b if bias else None)
    assert torch.equal(alone[0], found[-1]), "a row's bits do not depend on its neighbours"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("k", [16, 48, 96, 576])
@pytest.mark.slow
def test_rows_are_the_weight_in_effect(dtype: torch.dtype, int8: bool, k: int) -> None:
    _, w, _ = inputs(5, 64, k, dtype)
    packed = pack(w, int8=int8)
    rows = packed.rows(0, 64)
    assert rows.dtype == dtype
    close = 1e-2 if dtype == torch.bfloat16 else 1e-5
    expected = rotate(unpack(packed), packed.rotation)
    assert (rows.float() - expected).norm() < close * expected.norm()
    assert torch.equal(packed.rows(17, 23), rows[17:23])
    assert torch.equal(packed.gather(torch.tensor([63, 0, 5])), rows[[63, 0, 5]])


@pytest.mark.parametrize("int8", [False, True])
def test_it_is_nearer_than_q4_0_in_as_many_bytes(int8: bool) -> None:
    """llama.cpp's Q4_0: 32 weights share a scale of 16 bits, which is the largest of them by -8."""
    _, w, _ = inputs(1, 96, 576, torch.float32)
    packed = pack(w, int8=int8)
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
    packed = pack(w, int8=False)
    assert (packed.rows(0, 32) - w).abs().max() < 1e-5


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_stays_in_its_output(int8: bool, bad: float) -> None:
    x, w, _ = inputs(9, 32, 64, torch.bfloat16)
    clean = pack(w, int8=int8).linear(x, None)
    w[3, 7] = bad
    found = pack(w, int8=int8).linear(x, None)
    assert not found[:, 3].isfinite().any()
    assert torch.equal(found[:, 4:], clean[:, 4:])
