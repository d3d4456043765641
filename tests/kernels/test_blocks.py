"""Weights in the blocks of quantized checkpoints: expanded as llama.cpp's package does, and multiplied."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as gguf_dequantize
from hypothesis import given
from hypothesis import strategies as st
from support.live_bytes import peak_of
from support.random_blocks import copy, random_blocks, random_codes
from torch.nn import functional as F

from aioengine.kernels import ExpertPlan, get_backend
from aioengine.kernels.blocks import BlockWeight, StackedWeight
from aioengine.kernels.cpu.blocks import PackedBlocks
from aioengine.kernels.cpu.packed import PackedWeight
from aioengine.kernels.cpu.shared_library import load
from aioengine.kernels.portable import plain
from aioengine.kernels.portable.dequantize import GGUF_FORMATS, GROUPED_FORMATS, split_mxfp4
from aioengine.kernels.weight import PIECE_ELEMENTS
from aioengine.model.cuda.working_memory import EXPANDED_BYTES

ALL = [*GGUF_FORMATS, *GROUPED_FORMATS]


@pytest.mark.parametrize("format", GGUF_FORMATS)
def test_blocks_expand_to_the_bits_of_llama_cpp(format: str) -> None:
    weight = random_blocks(format, 5, 512)
    expected = gguf_dequantize(weight.data.numpy(), GGMLQuantizationType[format.upper()])
    assert torch.equal(weight.rows(0, 5), torch.from_numpy(expected))


def test_mxfp4_expands_to_the_bits_of_llama_cpp() -> None:
    """Every code, with exponents whose products are numbers; the smallest are subnormal ones."""
    raw = np.random.default_rng(0).integers(0, 256, (240, 2, 17), dtype=np.uint8)
    raw[:, :, 0] = np.arange(240)[:, None]
    raw[:, 0, 1:] = np.arange(16) * 17
    data = raw.reshape(240, -1)
    expected = torch.from_numpy(gguf_dequantize(data, GGMLQuantizationType.MXFP4))
    weight = BlockWeight("mxfp4", k=64, dtype=torch.float32, group=32, **split_mxfp4(torch.from_numpy(data)))
    assert torch.equal(weight.rows(0, 240), expected)
    assert torch.equal(PackedBlocks.pack([copy(weight)]).rows(0, 240), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", GGUF_FORMATS)
def test_packed_blocks_compute_what_the_expanded_weight_does(format: str, dtype: torch.dtype) -> None:
    check_products(random_blocks(format, 80, 512, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("format", GROUPED_FORMATS)
def test_packed_codes_compute_what_the_expanded_weight_does(
    format: str, zeros: bool, ordered: bool, dtype: torch.dtype
) -> None:
    check_products(random_codes(format, 80, 96, zeros=zeros, ordered=ordered, dtype=dtype))
    check_products(random_codes(format, 16, 96, group=96, zeros=zeros, ordered=ordered, dtype=dtype))


def check_products(weight: BlockWeight) -> None:
    """Bit for bit, for any number of rows and threads."""
    n, k, dtype = weight.n, weight.k, weight.dtype
    expanded = weight.rows(0, n)
    packed, plain = PackedBlocks.pack([copy(weight)]), PackedWeight.pack(expanded.clone())
    assert (packed.n, packed.k, packed.nbytes) == (n, k, weight.nbytes)
    assert torch.equal(packed.rows(3, n - 1), expanded[3 : n - 1])
    chosen = torch.tensor([n - 1, 0, 7, 7, *range(n)])
    assert torch.equal(packed.gather(chosen), expanded[chosen])
    assert torch.equal(weight.gather(chosen), expanded[chosen])
    bias = torch.randn(n, dtype=dtype)
    for rows in (0, 1, 3, 8, 150):
        x = torch.randn(rows, k, dtype=dtype)
        assert torch.equal(packed.linear(x, bias), plain.linear(x, bias))
        torch.testing.assert_close(weight.linear(x, bias), plain.linear(x, bias), rtol=0.02, atol=0.02)


@given(
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=5),
    formats=st.lists(st.sampled_from([*ALL, "plain"]), min_size=1, max_size=3),
    panels=st.integers(1, 4),
    biased=st.booleans(),
    bf16=st.booleans(),
)
def test_experts_are_each_its_own_parts(
    counts: list[int], formats: list[str], panels: int, biased: bool, bf16: bool
) -> None:
    """The same bits as each expert by itself has; some have no rows, or all of them none. All parts together
    are as a fused linear of a mixed file, whose members have formats of their own."""
    dtype, k, n = torch.bfloat16 if bf16 else torch.float32, 256, 16 * panels * len(formats)
    parts, expanded = list[BlockWeight | PackedWeight](), list[torch.Tensor]()
    for seed in range(len(counts) * len(formats)):
        format = formats[seed % len(formats)]
        if format == "plain" and seed > 0:
            weight = torch.randn(16 * panels, k, dtype=dtype)
            expanded.append(weight.clone())
            parts.append(PackedWeight.pack(weight))
            continue
        make = random_codes if format in GROUPED_FORMATS else random_blocks
        part = make("q8_0" if format == "plain" else format, 16 * panels, k, seed=seed, dtype=dtype)
        expanded.append(part.rows(0, part.n))
        parts.append(copy(part))
    whole, plan = (
        torch.cat(expanded),
        ExpertPlan(torch.repeat_interleave(torch.tensor(counts))[:, None], len(counts)),
    )
    x, bias = torch.randn(sum(counts), k, dtype=dtype), torch.randn(len(whole), dtype=dtype)
    packed = PackedBlocks.pack(parts)
    assert torch.equal(packed.rows(0, packed.n), whole)
    assert torch.equal(packed.linear(x, None), PackedWeight.pack(whole.clone()).linear(x, None))
    found = get_backend("cpu", "cpu").expert_linear(x, packed, bias if biased else None, plan)
    for e, rows in enumerate(x.split(counts)):
        own = slice(e * n, (e + 1) * n)
        alone = PackedWeight.pack(whole[own].clone()).linear(rows, bias[own] if biased else None)
        assert torch.equal(found[sum(counts[:e]) :][: len(rows)], alone)


@pytest.mark.parametrize("format", ALL)
@pytest.mark.slow
def test_plain_torch_expands_few_rows_of_experts_at_a_time(
    format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it takes is bounded by the plan for a GPU, however large experts are; results stay the same."""
    k, out, piece = 512, 800, 64 * 512
    make = random_codes if format in GROUPED_FORMATS else random_blocks
    weight = StackedWeight([make(format, out // 2, k, seed, dtype=torch.bfloat16) for seed in range(6)])
    x, bias = torch.randn(9, k, dtype=torch.bfloat16), torch.randn(3 * out, dtype=torch.bfloat16)
    experts = ExpertPlan(torch.tensor([0, 2, 2, 0, 2, 2, 2, 0, 0])[:, None], 3)
    expected = torch.empty(9, out, dtype=torch.bfloat16)
    for e, start, stop in experts.groups:
        own = slice(e * out, (e + 1) * out)
        expected[start:stop] = F.linear(x[start:stop], weight.rows(own.start, own.stop), bias[own])
    each = EXPANDED_BYTES // PIECE_ELEMENTS
    monkeypatch.setattr(plain, "PIECE_ELEMENTS", piece)
    assert peak_of(lambda: weight.rows(0, out)) > each * piece  # without pieces
    found = []
    peak = peak_of(lambda: found.append(plain.expert_linear(x, weight, bias, experts)))
    assert peak <= each * piece + 2 * expected.nbytes + 8 * k  # and the groups of inputs
    torch.testing.assert_close(found[0], expected, rtol=0, atol=0)


def test_a_stack_is_its_parts_one_after_the_other() -> None:
    parts = [random_blocks("q4_k", 16, 256), random_codes("int4", 32, 256)]
    stack, whole = StackedWeight(parts), torch.cat([part.rows(0, part.n) for part in parts])
    assert (stack.n, stack.k, stack.nbytes) == (48, 256, sum(part.nbytes for part in parts))
    for begin, end in ((0, 48), (5, 10), (10, 20), (16, 48), (40, 41)):
        assert torch.equal(stack.rows(begin, end), whole[begin:end])
    assert torch.equal(stack.gather(torch.tensor([47, 0, 16])), whole[[47, 0, 16]])
    x, bias = torch.randn(3, 256), torch.randn(48)
    torch.testing.assert_close(stack.linear(x, bias), x @ whole.T + bias, rtol=1e-4, atol=1e-4)


@pytest.fixture
def generic(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library for any CPU of this architecture."""
    library = load("generic")
    monkeypatch.setattr("aioengine.kernels.cpu.blocks.load", lambda: library)


@pytest.mark.usefixtures("generic")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plainest_instruction_set_expands_to_the_same_bits(dtype: torch.dtype) -> None:
    for format in ALL:
        make = random_codes if format in GROUPED_FORMATS else random_blocks
        weight = make(format, 32, 512, dtype=dtype)
        expanded = weight.rows(0, 32)
        assert torch.equal(PackedBlocks.pack([copy(weight)]).rows(0, 32), expanded), format
