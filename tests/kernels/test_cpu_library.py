"""The compiled CPU library: its operations against plain torch, at every instruction set that runs here."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import layer_cases
from support.layer_cases import LayerCase
from support.selection import mostly_slow_rows
from torch import Tensor
from torch.nn import functional as F

from aioengine.kernels import (
    Norm,
    get_backend,
)
from aioengine.kernels.cpu import build, shared_library, structs
from aioengine.kernels.cpu.int4 import Int4Weight
from aioengine.kernels.cpu.packed import PackedWeight
from aioengine.kernels.cpu.quantized import QuantizedWeight
from aioengine.kernels.portable import plain as reference

pytestmark = pytest.mark.skipif(build.shutil.which("c++") is None, reason="needs a C++ compiler")
DTYPES = [torch.float32, torch.bfloat16]
THREADS = 2


@pytest.fixture(params=sorted({next(iter(build.levels())), "generic", *build.FOR_TESTS}))
def lib(request: pytest.FixtureRequest) -> ctypes.CDLL:
    return shared_library.load(request.param)


def bf16(tensor: Tensor) -> int:
    return int(tensor.dtype == torch.bfloat16)


def close(found: Tensor, expected: Tensor, *, scale: float = 1.0) -> None:
    tolerance = scale * (1e-4 if found.dtype == torch.float32 else 2e-2)
    torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=st.integers(0, 70), panels=st.integers(1, 8), lanes=st.integers(1, 40), bias=st.booleans())
def test_packed_linear(dtype: torch.dtype, rows: int, panels: int, lanes: int, bias: bool) -> None:
    n, k = panels * 16, lanes * (4 // dtype.itemsize)
    generator = torch.Generator().manual_seed(rows * 1000 + n + k)
    x, w, b = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((rows, k), (n, k), (n,)))
    packed = PackedWeight.pack(w.clone())
    assert torch.equal(packed.rows(0, n), w)
    indices = torch.tensor([n - 1, 0, n // 2])
    assert torch.equal(packed.gather(indices), w[indices])
    expected = F.linear(x.double(), w.double(), b.double() if bias else None)
    found = packed.linear(x, b if bias else None)
    assert found.dtype == dtype
    close(found, expected, scale=math.sqrt(k))


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("form", [QuantizedWeight, Int4Weight])
def test_no_rows_of_quantized_linears_are_no_rows(form: type[QuantizedWeight], int8: bool) -> None:
    """Of a packed one, and of one in blocks, they are among the others' rows."""
    memory = torch.empty(form.packed_bytes(48, 32), dtype=torch.uint8)
    weight = form.pack(torch.randn(48, 32), memory, int8_activations=int8)
    assert weight.linear(torch.empty(0, 32), torch.randn(48)).shape == (0, 48)
    begins = torch.zeros(4, dtype=torch.int32)
    assert weight.experts(torch.empty(0, 32), None, begins).shape == (0, 16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 16, 4), (9, 50, 24), (130, 33, 40)])
def test_linear_whose_last_panel_is_not_full(
    lib: ctypes.CDLL, dtype: torch.dtype, rows: int, n: int, k: int
) -> None:
    x, w = torch.randn(rows, k).to(dtype), torch.randn(n, k).to(dtype)
    packed = torch.empty(math.ceil(n / 16) * 16 * k, dtype=dtype)
    lib.aio_pack(bf16(w), w.data_ptr(), packed.data_ptr(), n, k, THREADS)
    y = torch.full((rows + 1, n), math.nan, dtype=dtype)
    matrix = structs.Matrix(packed=packed.data_ptr(), n=n, k=k)
    lib.aio_product(bf16(x), ctypes.byref(matrix), x.data_ptr(), y.data_ptr(), rows, None, 0, THREADS)
    close(y[:rows], x.float() @ w.float().T, scale=math.sqrt(k))
    assert y[rows].isnan().all(), "nothing may be written beyond the last row"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 16), (3, 17), (40, 64), (32, 576)])
def test_norm_and_activation(lib: ctypes.CDLL, dtype: torch.dtype, rows: int, size: int) -> None:
    hidden, delta = torch.randn(rows, size).to(dtype), torch.randn(rows, size).to(dtype)
    weight, out = torch.randn(size).to(dtype), torch.empty(rows, size, dtype=dtype)
    outputs_weight = torch.randn(size).to(dtype)

    def add_norm(total: Tensor, added: Tensor | None, normed_by: Tensor | None, out: Tensor) -> None:
        lib.aio_add_rms_norm(
            *(bf16(out), total.data_ptr(), None if added is None else added.data_ptr()),
            *(None if normed_by is None else normed_by.data_ptr(), weight.data_ptr(), out.data_ptr()),
            *(rows, size, 1.0, 1e-5, 1, 0.0, THREADS),
        )

    for added in (None, delta):
        total = hidden.clone()
        add_norm(total, added, None, out)
        expected = hidden if added is None else hidden + added
        assert torch.equal(total, expected)
        close(out, reference.add_rms_norm(expected, None, Norm(weight, 1e-5)))
    # A delta that is normed itself, in place, and whose memory gets the result: the bits of three operations.
    normed = torch.empty_like(delta)
    lib.aio_add_rms_norm(
        *(bf16(out), delta.data_ptr(), None, None, outputs_weight.data_ptr(), normed.data_ptr()),
        *(rows, size, 1.0, 1e-5, 1, 0.0, THREADS),
    )
    total, at_once = hidden.clone(), hidden.clone()
    add_norm(total, normed, None, out)
    add_norm(at_once, delta, outputs_weight, delta)
    assert torch.equal(at_once, total) and torch.equal(delta, out)
    gate_up = (8 * torch.randn(rows, 2 * size)).to(dtype)
    gate_up[0, :2] = torch.tensor([-300.0, 300.0]).to(dtype)  # where e^x overflows
    gate = structs.Gate(bf16(out), structs.ACTIVATIONS.index("silu"), 0.0, 0.0, out.data_ptr())
    lib.aio_activate(ctypes.byref(gate), gate_up.data_ptr(), rows, size, THREADS)
    close(out, reference.silu_and_mul(gate_up))


@functools.cache
def expected_of(case: LayerCase) -> list[Tensor]:
    """Plain torch's answer: once for all instruction sets, since it takes long."""
    return layer_cases.run(reference, case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 7, 100])
@pytest.mark.parametrize(
    ("heads", "kv", "d", "block"),
    mostly_slow_rows(
        [(9, 3, 64, 16), (4, 4, 32, 32), (8, 1, 128, 16), (64, 1, 16, 16), (5, 5, 80, 48)], (4, 4, 32, 32)
    ),
)
def test_rotation_and_attention(
    lib: ctypes.CDLL,
    dtype: torch.dtype,
    window: int | None,
    heads: int,
    kv: int,
    d: int,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("aioengine.kernels.cpu.layer.load", lambda: lib)
    spans = ((0, 1), (5, 1), (63, 1), (64, 1), (200, 1), (0, 130), (33, 70), (15, 2))
    case = LayerCase(spans, heads, kv, d, block, window, dtype=dtype)
    layer_cases.close(layer_cases.run(get_backend("cpu", "cpu"), case), expected_of(case))


def test_no_compiler_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(build.Unavailable, match=r"no C\+\+ compiler is found .*install g\+\+"):
        build.compiled()


def test_a_compiler_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "bad"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit\necho "no luck in $TMPDIR" >&2\nexit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", "/nowhere")
    with pytest.raises(build.Unavailable, match=rf"status 1: no luck in {tmp_path}/cache/aioengine/kernels/"):
        build.compiled()
    assert list((tmp_path / "cache" / "aioengine" / "kernels").iterdir()) == []


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Callable[[], int]]:
    """Makes the compiler one that only notes that it ran, after a line of shell; returns how often it did."""

    def install(line: str = ":") -> Callable[[], int]:
        compiler, notes = tmp_path / "c++", tmp_path / "notes"
        compiler.write_text(
            f'#!/bin/sh\n[ "$1" = --version ] && exit\necho >> {notes}\n{line}\n'
            'for last; do :; done\necho > "$last"\n'
        )
        compiler.chmod(0o755)
        monkeypatch.setenv("CXX", str(compiler))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        return lambda: len(notes.read_text().splitlines())

    return install


def test_it_is_compiled_once(runs: Callable[..., Callable[[], int]], tmp_path: Path) -> None:
    """Also where a wheel is built after that."""
    ran = runs()
    path = build.compiled("generic")
    once = ran()
    assert path.exists() and once > 1
    assert build.compiled("generic") == path and ran() == once
    build.prebuild(tmp_path / "wheel", ["generic"])
    assert ran() == once and len(list((tmp_path / "wheel").iterdir())) == 1
    assert build.compiled("generic", extra_flags=["-O1"]) != path and ran() == 2 * once


def test_a_compiler_that_cannot_link_the_runtime_in(
    runs: Callable[..., Callable[[], int]], tmp_path: Path
) -> None:
    """Its library is for this machine, and not for others."""
    ran = runs('case "$*" in *-static-libstdc++*) echo "error: no archive" >&2; exit 1 ;; esac')
    path = build.compiled("generic")
    before = ran()
    assert build.compiled("generic") == path and ran() == before
    with pytest.raises(build.Unavailable, match="no archive"):
        build.prebuild(tmp_path / "wheel", ["generic"])


def test_one_openmp_runtime() -> None:
    shared_library.load()
    assert len(shared_library.openmp_runtimes()) <= 1
