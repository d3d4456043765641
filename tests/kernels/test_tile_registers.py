"""Linears on tile registers: a stand-in in plain C++ anywhere, and a CPU that has them bit for bit."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aioengine.kernels.cpu import build, shared_library
from aioengine.kernels.cpu.structs import Kind, Matrix

pytestmark = pytest.mark.skipif(build.shutil.which("c++") is None, reason="needs a C++ compiler")
needs_tiles = pytest.mark.skipif("amx" not in build.levels(), reason="needs a CPU with AMX")
THREADS = 2
BF16 = torch.bfloat16


def linear(
    level: str, x: Tensor, weight: Tensor, bias: Tensor | None = None, threads: int = THREADS
) -> Tensor:
    """``x W^T + bias`` in bfloat16, as a level computes it."""
    library, (n, k), rows = shared_library.load(level), weight.shape, len(x)
    packed, y = torch.empty(-(-n // 16) * 16 * k, dtype=BF16), torch.empty(rows, n, dtype=BF16)
    library.aio_pack(1, weight.data_ptr(), packed.data_ptr(), n, k, threads)
    start = None if bias is None else bias.data_ptr()
    matrix = Matrix(packed=packed.data_ptr(), bias=start, n=n, k=k)
    library.aio_product(1, ctypes.byref(matrix), x.data_ptr(), y.data_ptr(), rows, None, 0, threads)
    return y


def linear_int8(level: str, x: Tensor, weight: Tensor) -> Tensor:
    """The same with weights and activations as int8."""
    library, (n, k), rows = shared_library.load(level), weight.shape, len(x)
    packed, y = torch.empty(n * k, dtype=torch.uint8), torch.empty(rows, n, dtype=BF16)
    scale, start = torch.empty(n), torch.empty(n, dtype=torch.int32)
    begins = scale.data_ptr(), start.data_ptr()
    library.aio_quantize(1, weight.data_ptr(), packed.data_ptr(), *begins, n, k, 64, THREADS)
    matrix = Matrix(packed=packed.data_ptr(), n=n, k=k, kind=Kind.INT8, rotation=64)
    matrix.scale, matrix.start = begins
    library.aio_product(1, ctypes.byref(matrix), x.data_ptr(), y.data_ptr(), rows, None, 0, THREADS)
    return y


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def as_defined(x: Tensor, weight: Tensor) -> Tensor:
    """What the manual says of TDPBF16PS: of each 32 inputs the even and the odd ones are summed apart, and
    both sums are added to the total. Products of two bfloat16 are exact in float32."""
    products = x.float()[:, None, :] * weight.float()[None, :, :]
    total = torch.zeros(len(x), len(weight))
    for begin in range(0, x.shape[1], 32):
        parts = torch.zeros(2, len(x), len(weight))
        for k in range(begin, begin + 32):
            parts[k % 2] += products[..., k]
        total += parts[0] + parts[1]
    return total.to(BF16)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 33])
def test_products_are_added_in_the_order_that_the_manual_defines(rows: int) -> None:
    x, weight = random(rows, 96), random(40, 96, seed=1)
    assert torch.equal(linear("stand_in", x, weight), as_defined(x, weight))


def test_denormals_count_as_zero() -> None:
    small = torch.full((1, 32), 2.0**-130, dtype=BF16)
    assert small.count_nonzero() == 32
    ones = torch.full((16, 32), 2.0**100, dtype=BF16)
    assert linear("stand_in", small, ones).count_nonzero() == 0


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 140), n=st.integers(1, 100), steps=st.integers(1, 3), bias=st.booleans())
def test_a_row_has_the_same_bits_in_any_company(rows: int, n: int, steps: int, bias: bool) -> None:
    x, weight = random(rows, 32 * steps, seed=rows), random(n, 32 * steps, seed=n)
    added = random(n) if bias else None
    found = linear("stand_in", x, weight, added)
    expected = x.double() @ weight.double().T + (0 if added is None else added.double())
    torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=0.1)
    for row in {0, rows // 2, rows - 1}:
        assert torch.equal(linear("stand_in", x[row : row + 1], weight, added, threads=1)[0], found[row])


@pytest.mark.parametrize(("rows", "n", "k"), [(5, 48, 64), (16, 80, 128), (40, 32, 192)])
def test_whole_numbers_are_as_at_other_levels(rows: int, n: int, k: int) -> None:
    x, weight = random(rows, k), random(n, k, seed=1)
    assert torch.equal(linear_int8("stand_in", x, weight), linear_int8("generic", x, weight))


@needs_tiles
@pytest.mark.parametrize("scale", [1.0, 1e-18, 1e-30])
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 48, 32), (17, 50, 64), (32, 96, 576), (130, 64, 96)])
def test_the_stand_in_does_what_the_cpu_does(rows: int, n: int, k: int, scale: float) -> None:
    """With sums and products that are denormal, too. Whole numbers are scaled afterwards, as everywhere."""
    x, weight = random(rows, k) * scale, random(n, k, seed=1) * scale
    assert torch.equal(linear("stand_in", x, weight), linear("amx", x, weight))
    if k % 64 == 0 and n % 16 == 0 and scale == 1.0:
        assert torch.equal(linear_int8("stand_in", x, weight), linear_int8("amx", x, weight))


@needs_tiles
@pytest.mark.parametrize(("heads", "kv", "d"), [(9, 3, 64), (3, 3, 32)])
def test_attention_has_the_same_bits_in_any_chunks(heads: int, kv: int, d: int) -> None:
    """Of a prompt in two chunks, and of its last token alone: the same bits as in its chunk."""
    length, block = 75, 16
    tables = torch.tensor([[4, 2, 0, 3, 1]], dtype=torch.int32)
    qkv = random(length, heads + 2 * kv, d)

    def attend(level: str, begins: list[int]) -> Tensor:
        library = shared_library.load(level)
        cache = torch.full((2, 5, block * kv * d), torch.nan, dtype=BF16)
        cells = (tables[0][torch.arange(length) // block] * block + torch.arange(length) % block).long()
        out = torch.empty(length, heads * d, dtype=BF16)
        for begin, end in pairwise([*begins, length]):
            count, rows = end - begin, qkv[begin:end].clone()
            cos, sin = torch.ones(count, d // 2), torch.zeros(count, d // 2)
            last = torch.zeros(count, dtype=torch.uint8)
            last[-1] = 1
            places = cache[0].data_ptr(), cache[1].data_ptr()
            library.aio_rope_store(
                *(
                    1,
                    rows.data_ptr(),
                    cos.data_ptr(),
                    sin.data_ptr(),
                    cells[begin:].data_ptr(),
                    last.data_ptr(),
                ),
                *(*places, count, heads, kv, d, block, d // 2, 0, 0, None, THREADS),
            )
            span = torch.tensor([[0, count, begin]], dtype=torch.int32)
            library.aio_attention(
                *(
                    1,
                    rows.data_ptr(),
                    (heads + 2 * kv) * d,
                    *places,
                    tables.data_ptr(),
                    5,
                    span.data_ptr(),
                    1,
                ),
                *(out[begin:].data_ptr(), heads, kv, d, block, 0, d**-0.5, 0.0, None, 0),
                THREADS,
            )
        return out

    found = attend("amx", [0, 40])
    assert torch.equal(found, attend("amx", [0, 74])) and torch.equal(found, attend("amx", [0]))
    near = attend("stand_in", [0, 40])
    torch.testing.assert_close(near, found, rtol=2e-2, atol=2e-2)
    assert torch.equal(near, attend("stand_in", [0, 74]))


class Where(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("a", "a_rank", "b", "b_rank", "affine", "scale")]


class Slots(ctypes.Structure):
    _fields_ = [
        ("memory", ctypes.c_void_p),
        ("table", ctypes.POINTER(Where)),
        *((name, ctypes.c_int64) for name in ("places", "int8", "turned")),
    ]


class Segment(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("slot", "begin", "end", "rank")),
        ("weight", ctypes.c_float),
    ]


class Slice(ctypes.Structure):
    _fields_ = [("out", ctypes.c_int64), ("offset", ctypes.c_int64)]


def adapted(
    level: str, x: Tensor, y: Tensor, a: Tensor, b: Tensor, segments: list[tuple[int, int, int]]
) -> tuple[Tensor, Tensor]:
    """A x, and y + B A x, for adapters [slot, rank, k] and [slot, out, rank] of rows begin..end-1."""
    library, (count, rank, k), out = shared_library.load(level), a.shape, b.shape[1]
    memory = torch.cat([a.reshape(count, -1), b.reshape(count, -1)], dim=1).flatten()
    each = (k + out) * rank
    table = (Where * count)(*(Where(i * each, rank, i * each + k * rank, rank, -1, -1) for i in range(count)))
    matrices = torch.tensor([[row.b, out, rank] for row in table])
    library.aio_turn(memory.data_ptr(), 2, matrices.data_ptr(), count)
    slots = ctypes.byref(Slots(memory.data_ptr(), table, 1, 0, 1))
    made = (Segment * len(segments))(*(Segment(*segment, rank, 1.0) for segment in segments))
    h, y = torch.full((len(x), rank + 16), torch.nan, dtype=BF16), y.clone()
    library.aio_lora_shrink(
        *(1, x.data_ptr(), k, slots, 0, h.data_ptr(), k, 1, rank + 16, made, len(made), THREADS),
    )
    slice_ = (Slice * 1)(Slice(out, 0))
    library.aio_lora_expand(
        *(1, h.data_ptr(), slots, 0, slice_, 1, rank + 16, y.data_ptr(), out, made, len(made), THREADS),
    )
    return h, y


@pytest.mark.parametrize("rank", [4, 16, 24, 48])
def test_adapters_have_the_same_bits_in_any_company(rank: int) -> None:
    rows, k, out = 70, 64, 48
    x, y = random(rows, k), random(rows, out, seed=1)
    a, b = random(3, rank, k, seed=2) / 8, random(3, out, rank, seed=3) / 8
    segments = [(0, 1, 2), (2, 2, 20), (1, 24, 70)]
    h, found = adapted("stand_in", x, y, a, b, segments)
    if "amx" in build.levels():
        on_cpu = adapted("amx", x, y, a, b, segments)
        for slot, begin, end in segments:
            near = h[begin:end], found[begin:end]
            for mine, other in zip(near, (part[begin:end] for part in on_cpu), strict=True):
                assert (
                    torch.equal(mine, other) if rank % 16 == 0 else mine.allclose(other, rtol=0.02, atol=0.05)
                )
    for slot, begin, end in segments:
        product = x[begin:end].float() @ a[slot].float().T
        torch.testing.assert_close(h[begin:end, :rank].float(), product, rtol=1e-2, atol=1e-2)
        assert h[begin:end, rank:].count_nonzero() == 0
        expected = y[begin:end].float() + product @ b[slot].float().T
        torch.testing.assert_close(found[begin:end].float(), expected, rtol=2e-2, atol=5e-2)
        for row in (begin, end - 1):
            alone = adapted("stand_in", x[row : row + 1], y[row : row + 1], a, b, [(slot, 0, 1)])
            assert torch.equal(alone[0][0], h[row]) and torch.equal(alone[1][0], found[row])
    assert torch.equal(found[20:24], y[20:24])


PROGRAM = """
import ctypes, os, sys, threading
from aioengine.kernels.cpu import build

class Stack(ctypes.Structure):
    _fields_ = [("pointer", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

if sys.argv[1] == "small stack":
    memory = ctypes.create_string_buffer(4096)
    stack = Stack(ctypes.addressof(memory), 0, len(memory))
    assert ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None) == 0
    print(next(iter(build.levels())), build.better_level())
else:
    import torch
    sys.path.insert(0, sys.argv[2])
    from test_tile_registers import linear, random
    x, weight = random(3, 32), random(16, 32)
    expected = linear("amx", x, weight, threads=1)
    found = []
    late = threading.Thread(target=lambda: found.append(linear("amx", x, weight, threads=1)))
    late.start(), late.join()
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(linear("amx", x, weight, threads=1), expected) else 1)
    print(torch.equal(found[0], expected), os.waitpid(child, 0)[1])
"""


def run(*arguments: str) -> str:
    command = [sys.executable, "-c", PROGRAM, *arguments, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@needs_tiles
def test_a_small_signal_stack_leaves_the_next_level() -> None:
    level, _, why = run("small stack").partition(" ")
    assert level == "avx512_bf16"
    assert why.startswith(
        "amx, but Linux does not grant tile registers: No space left on device (a thread's alternate"
    )


@needs_tiles
def test_threads_that_come_late_and_forked_processes_have_the_permission() -> None:
    assert run("fork") == "True 0"


def test_a_level_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    best = next(iter(build.levels()))
    assert build.better_level() is None
    monkeypatch.setenv("AIOENGINE_CPU_LEVEL", "generic")
    assert list(build.levels()) == ["generic"]
    if best != "generic":
        assert build.better_level() == f"{best}, but AIOENGINE_CPU_LEVEL is generic"
    monkeypatch.setenv("AIOENGINE_CPU_LEVEL", "avx1024")
    with pytest.raises(
        ValueError, match="AIOENGINE_CPU_LEVEL=avx1024: this machine cannot run that level; it can"
    ):
        build.levels()


def test_linux_that_refuses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        """A C library whose system calls end as a seccomp filter has them end."""

        def syscall(self, *arguments: int) -> int:
            ctypes.set_errno(1)
            return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda name, use_errno: Refusing())
    build.tiles_refused.cache_clear()
    try:
        refused = build.tiles_refused()
        assert refused is not None and refused.endswith("not permitted (a seccomp filter forbids arch_prctl)")
    finally:
        build.tiles_refused.cache_clear()
