"""Weights with an adapter's product added, in both forms of storage, against float64 rounded once."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aioengine.kernels import MergeableWeight, PlainWeight
from aioengine.kernels.cpu import build, packed, shared_library
from aioengine.kernels.cpu.packed import PackedWeight

DTYPES = [torch.float32, torch.bfloat16]
FORMS = [
    "plain",
    pytest.param(
        "packed", marks=pytest.mark.skipif(build.shutil.which("c++") is None, reason="needs a C++ compiler")
    ),
]


def form_of(form: str, weight: torch.Tensor) -> MergeableWeight:
    return PlainWeight(weight) if form == "plain" else PackedWeight.pack(weight.clone())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=40, deadline=None)
@given(
    before=st.integers(0, 3),
    panels=st.integers(1, 20),
    after=st.integers(0, 3),
    k=st.integers(1, 24).map(lambda quads: 4 * quads),
    rank=st.integers(0, 33),
    seed=st.integers(0, 99),
)
def test_rows_get_the_product_and_others_stay(
    form: str, dtype: torch.dtype, before: int, panels: int, after: int, k: int, rank: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    n, first, rows = 16 * (before + panels + after), 16 * before, 16 * panels
    weight = torch.randn(n, k, generator=generator).to(dtype)
    b, a = torch.randn(rank, rows, generator=generator), torch.randn(k, rank, generator=generator)
    base = form_of(form, weight.clone())
    memory = torch.empty(base.nbytes, dtype=torch.uint8)
    out = base.like(memory)
    out.data.fill_(7)
    base.add_low_rank(out, first, b, a)
    assert torch.equal(base.rows(0, n), weight), "the base weight is not written"
    inside = slice(first, first + rows)
    found = out.rows(0, n)
    expected = weight[inside].double() + (a.double() @ b.double()).T
    step = 2**-23 if dtype == torch.float32 else 2**-8
    allowed = step * expected.abs() + 2**-22 * (1 + rank) * 8
    assert ((found[inside].double() - expected).abs() <= allowed).all()
    outside = torch.cat([found[:first], found[first + rows :]])
    assert (outside == 7).all(), "only these rows"
    if rank == 0:
        assert torch.equal(found[inside], weight[inside]), "the very bits"


@pytest.mark.skipif(build.shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_rounds_to_nearest_even_and_keeps_nan(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(32, 8).to(dtype)
    a, b = torch.zeros(8, 1), torch.ones(1, 32)
    a[:, 0] = torch.tensor([0.0, 2**-9, 2**-8, 3 * 2**-9, torch.nan, torch.inf, -torch.inf, 2**-20])
    expected = (weight.float() + (a @ b).T).to(dtype)
    for level in sorted({next(iter(build.levels())), "generic"}):
        library: ctypes.CDLL = shared_library.load(level)
        monkeypatch.setattr(packed, "load", lambda library=library: library)
        base = PackedWeight.pack(weight.clone())
        out = base.like(torch.empty(base.nbytes, dtype=torch.uint8))
        base.add_low_rank(out, 0, b, a)
        torch.testing.assert_close(out.rows(0, 32), expected, rtol=0, atol=0, equal_nan=True)
