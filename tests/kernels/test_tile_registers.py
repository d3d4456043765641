"""Linears on tile registers: a stand-in in plain C++ anywhere, and a CPU that has them bit for bit."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cpu_levels import at_level
from support.lora_cases import make_case, turned
from torch import Tensor

from aioengine.kernels import AttentionPlan, LayerCache, LoRABatch, Rotation, Scores, Span, get_backend
from aioengine.kernels.cpu import build
from aioengine.kernels.cpu.packed import PackedWeight
from aioengine.kernels.cpu.quantized import QuantizedWeight
from aioengine.kernels.portable import plain as reference

pytestmark = pytest.mark.skipif(build.shutil.which("c++") is None, reason="needs a C++ compiler")
HERE = ["amx"] if "amx" in build.levels() else []
needs_tiles = pytest.mark.skipif(not HERE, reason="needs a CPU with AMX")
BF16 = torch.bfloat16


def linear(level: str, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias`` in bfloat16, as a level computes it."""
    with at_level(level):
        return PackedWeight.pack(weight.clone()).linear(x, bias)


def linear_int8(level: str, x: Tensor, weight: Tensor) -> Tensor:
    """The same with weights and activations as int8."""
    with at_level(level):
        memory = torch.empty(QuantizedWeight.packed_bytes(*weight.shape), dtype=torch.uint8)
        return QuantizedWeight.pack(weight, memory, int8_activations=True).linear(x, None)


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
    x, weight = random(rows, 96), random(48, 96, seed=1)
    assert torch.equal(linear("stand_in", x, weight), as_defined(x, weight))


def test_denormals_count_as_zero() -> None:
    small = torch.full((1, 32), 2.0**-130, dtype=BF16)
    assert small.count_nonzero() == 32
    ones = torch.full((16, 32), 2.0**100, dtype=BF16)
    assert linear("stand_in", small, ones).count_nonzero() == 0


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 140), panels=st.integers(1, 7), steps=st.integers(1, 3), bias=st.booleans())
def test_a_row_has_the_same_bits_in_any_company(rows: int, panels: int, steps: int, bias: bool) -> None:
    x, weight = random(rows, 32 * steps, seed=rows), random(16 * panels, 32 * steps, seed=panels)
    added = random(16 * panels) if bias else None
    found = linear("stand_in", x, weight, added)
    expected = x.double() @ weight.double().T + (0 if added is None else added.double())
    torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=0.1)
    for row in {0, rows // 2, rows - 1}:
        assert torch.equal(linear("stand_in", x[row : row + 1], weight, added)[0], found[row])


@pytest.mark.parametrize(("rows", "n", "k"), [(5, 48, 64), (16, 80, 128), (40, 32, 192)])
def test_whole_numbers_are_as_at_other_levels(rows: int, n: int, k: int) -> None:
    x, weight = random(rows, k), random(n, k, seed=1)
    assert torch.equal(linear_int8("stand_in", x, weight), linear_int8("generic", x, weight))


@needs_tiles
@pytest.mark.parametrize("scale", [1.0, 1e-18, 1e-30])
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 48, 32), (17, 64, 64), (32, 96, 576), (130, 64, 96)])
def test_the_stand_in_does_what_the_cpu_does(rows: int, n: int, k: int, scale: float) -> None:
    """With sums and products that are denormal, too. Whole numbers are scaled afterwards, as everywhere."""
    x, weight = random(rows, k) * scale, random(n, k, seed=1) * scale
    assert torch.equal(linear("stand_in", x, weight), linear("amx", x, weight))
    if k % 64 == 0 and scale == 1.0:
        assert torch.equal(linear_int8("stand_in", x, weight), linear_int8("amx", x, weight))


@pytest.mark.parametrize(("heads", "kv", "d"), [(9, 3, 64), (3, 3, 32)])
def test_attention_has_the_same_bits_in_any_chunks(heads: int, kv: int, d: int) -> None:
    """Of a prompt in two chunks, and of its last token alone: the same bits as in its chunk."""
    length, block, blocks = 75, 16, [4, 2, 0, 3, 1]
    qkv, backend = random(length, heads + 2 * kv, d), get_backend("cpu", "cpu")

    def attend(begins: list[int]) -> Tensor:
        cache = LayerCache(*torch.full((2, len(blocks), block, kv, d), torch.nan, dtype=BF16))
        out = []
        for begin, end in pairwise([*begins, length]):
            plan = AttentionPlan([Span(0, end - begin, begin)], [blocks], block)
            unturned = Rotation(*(torch.full((end - begin, 1, d // 2), value) for value in (1.0, 0.0)))
            rows = qkv[begin:end].clone()
            backend.rope_store(rows, None, unturned, cache, plan)
            out.append(backend.paged_attention(rows, cache, plan, Scores()))
        return torch.cat(out)

    found = []
    for level in ("stand_in", *HERE):
        with at_level(level):
            found.append(attend([0, 40]))
            assert torch.equal(found[-1], attend([0, 74])), level
            assert level == "stand_in" or torch.equal(found[-1], attend([0]))
    torch.testing.assert_close(found[0], found[-1], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("rank", [4, 16, 24, 48])
def test_adapters_have_the_same_bits_in_any_company(rank: int) -> None:
    sequences = [(-1, 4), (0, 2), (1, 18), (2, 46)]
    case = make_case(sequences, [rank] * 3, rank, n_in=64, widths=(48,), targeted=(0,), dtype=BF16)
    case, backend = case._replace(x=case.x / 8), get_backend("cpu", "cpu")

    def adapted(batch: LoRABatch, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        h, y = backend.lora_shrink(x, pool, batch), y.clone()
        backend.lora_expand(h, pool, y, batch)
        return h, y

    found = []
    for level in ("stand_in", *HERE):
        with at_level(level):
            pool = turned(case.pool)
            h, y = adapted(case.batch, case.x, case.y)
            for token in (4, 5, 6, 23, 24, 69):
                one = slice(token, token + 1)
                for alone, whole in zip(
                    adapted(case.alone(token), case.x[one], case.y[one]), (h, y), strict=True
                ):
                    assert torch.equal(alone[0], whole[token]), level
        found.append((h, y))
    true = reference.lora_shrink(case.x, case.pool, case.batch), case.y.clone()
    reference.lora_expand(true[0], case.pool, true[1], case.batch)
    for mine, other, expected in zip(found[0], found[-1], true, strict=True):
        torch.testing.assert_close(mine, expected, rtol=2e-2, atol=5e-2)
        assert torch.equal(mine, other) if rank % 16 == 0 else mine.allclose(other, rtol=0.02, atol=0.05)


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
    from aioengine.kernels.cpu.packed import PackedWeight
    torch.set_num_threads(1)
    weight, x = PackedWeight.pack(torch.randn(16, 32).bfloat16()), torch.randn(3, 32).bfloat16()
    expected = weight.linear(x, None)
    found = []
    late = threading.Thread(target=lambda: found.append(weight.linear(x, None)))
    late.start(), late.join()
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(weight.linear(x, None), expected) else 1)
    print(torch.equal(found[0], expected), os.waitpid(child, 0)[1])
"""


def run(argument: str) -> str:
    command = [sys.executable, "-c", PROGRAM, argument]
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
