"""The Triton kernels compiled for GPUs that are not here: they fit, spill nothing, and use tensor cores.

A sample; with AIOENGINE_FUZZ_RUNS set, as ``make fuzz`` does, all that the default table can choose.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.selection import mostly_slow

from aioengine.kernels.triton.table import SHORT, Key, default_expand, default_shrink

aot = pytest.importorskip("support.triton_variants")
targets = pytest.importorskip("support.triton_targets")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)


def sample() -> list[aot.Variant]:
    """Decoding and prefill at the usual rank, the largest blocks, and each dtype once."""
    chosen = list(aot.of_elementwise("bf16"))
    for dtype, bits, rank, longest in (("bf16", 16, 16, 1), ("bf16", 16, 512, 2048), ("fp16", 16, 64, 1)):
        parts = list(aot.of_shrink(dtype, default_shrink(Key.of("shrink", bits, rank, 4096, longest))))
        chosen += [parts[0], parts[-1]]
        chosen.append(aot.of_expand(dtype, default_expand(Key.of("expand", bits, rank, 4096, longest))))
    chosen += aot.of_attention("bf16", 16, 128, 4)
    chosen += [v for v in aot.of_attention("bf16", 16, 64, 3) if dict(v.constants)["SINKS"]]
    chosen += [*aot.of_attention("fp32", 32, 128, 4), *aot.of_rope("bf16", 128), aot.of_norm("bf16", 4096)]
    chosen += list(aot.of_blocks("bf16", 16))[::4]
    mxfp4 = aot.FORMATS["mxfp4"]
    chosen += [v for v in aot.of_blocks("bf16", 16) if dict(v.constants)["FORMAT"] == mxfp4]
    chosen.append(aot.of_expand("fp32", default_expand(Key.of("expand", 32, 64, 4096, 2048))))
    return chosen


ALL = bool(os.environ.get("AIOENGINE_FUZZ_RUNS"))
VARIANTS = aot.variants() if ALL else sample()


def test_the_sample_is_of_what_is_used() -> None:
    assert set(sample()) <= set(aot.variants())


@pytest.mark.parametrize("capability", mostly_slow([80, 90], 90))
@pytest.mark.parametrize("variant", mostly_slow(VARIANTS, *VARIANTS[::8]), ids=str)
def test_variant(variant: aot.Variant, capability: int) -> None:
    if not aot.compiles(variant, capability):
        return
    usage = aot.compile_variant(variant, capability)
    blocks = dict(variant.constants)
    # Heads of 256 do not fit into registers in prompts: they spill up to 328 bytes, 532 with a float8 cache.
    # Elsewhere the assembler at times spills a few bytes for the sake of one more block, with registers left.
    large = variant.kernel == "attention" and blocks["BLOCK_D"] > 128 and blocks["BLOCK_M"] >= 64
    few = 24 if usage.registers <= 168 else 0
    assert usage.spilled_bytes <= ((532 if variant.fp8 else 328) if large else few)
    assert usage.registers <= targets.REGISTERS
    shared_bytes = targets.GPUS[f"sm_{capability}"].limits.shared_bytes
    assert usage.shared_bytes <= shared_bytes
    if dict(variant.constants).get("BLOCK_M") == SHORT and variant.dtype != "fp32":
        # Decoding waits for memory: room for two blocks on a multiprocessor, so that one is always asking.
        assert 2 * usage.shared_bytes <= shared_bytes
        assert 2 * usage.registers * 32 * variant.num_warps <= targets.FILE_REGISTERS

    wide = variant.kernel == "block_linear" and blocks["BLOCK_K"] >= 64
    if wide or variant.kernel in ("shrink", "expand", "attention"):
        tensor_cores = re.search(r"mma\.sync|wgmma\.mma_async", usage.ptx)
        assert bool(tensor_cores) == (variant.dtype != "fp32")
    if blocks.get("SPLIT", 0) or blocks.get("SPLITS", 1) > 1:
        # All threads' stores come before the count that announces them, and their loads after it.
        assert re.search(
            r"st\.global.*bar\.sync.*atom\.global\.gpu\.acq_rel\.add.*bar\.sync.*ld\.global\.cg",
            usage.ptx,
            re.DOTALL,
        )


def largest(gpu: targets.Gpu) -> Iterator[aot.Variant]:
    """What takes most of a GPU: attention, prompts with adapters of rank 256, and
    products with quantized weights."""
    heads = (64, 128, 256) if ALL else (128,)
    for dtype, bits in (("bf16", 16), ("fp16", 16), ("fp32", 32)) if ALL else (("bf16", 16),):
        for head_dim in heads:
            every = list(aot.of_attention(dtype, bits, head_dim, 4, [gpu]))
            plain = [v for v in every if not v.fp8 and not dict(v.constants)["WINDOWED"]]
            yield from every if ALL else plain[1:]
        for rank in (16, 64, 256) if ALL else (256,):
            for longest in (1, 2048):
                shrink = default_shrink(Key.of("shrink", bits, rank, 4096, longest))
                yield from aot.of_shrink(dtype, shrink)
                yield aot.of_expand(dtype, default_expand(Key.of("expand", bits, rank, 4096, longest)))
        blocks = list(aot.of_blocks(dtype, bits))
        yield from blocks if ALL else [max(blocks, key=lambda block: dict(block.constants)["BLOCK_K"])]


OTHERS = {"sm_86", "sm_89", "sm_100", "sm_120", "gfx90a", "gfx942"} if ALL else {"sm_100", "sm_120", "gfx942"}


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        pytest.param(name, variant, id=f"{name}-{variant}", marks=pytest.mark.slow)
        for name in sorted(OTHERS)
        for variant in largest(targets.GPUS[name])
    ],
)
def test_what_is_chosen_fits_on_other_gpus(name: str, variant: aot.Variant) -> None:
    """GPUs with 99 KiB of shared memory, AMD's with 64, and B200, whose sums lie in a memory of their own."""
    gpu = targets.GPUS[name]
    if not aot.compiles(variant, gpu.capability):
        return
    usage = aot.compile_variant(variant, name)
    assert usage.shared_bytes <= gpu.limits.shared_bytes
    if not ALL:  # a shrink for prompts spills 24 bytes on sm_120
        assert usage.spilled_bytes <= 32
    if variant.kernel in ("attention", "expand", "shrink", "block_linear") and variant.dtype != "fp32":
        assert re.search(r"mma\.sync|wgmma|tcgen05\.mma|v_mfma", usage.ptx), "on tensor cores"


def test_products_are_added_before_they_are_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever Triton's default is."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    assert "fma.rn.f32" in aot.compile_variant(next(aot.of_rope("bf16", 128)), 90).ptx


def test_kernels_are_in_the_language_of_the_oldest_triton() -> None:
    """Triton 3.2 refuses ``a or b or c``."""
    folder = Path(inspect.getfile(aot)).parent / "jit"
    chained = [
        f"{path.name}:{node.lineno}"
        for path in sorted(folder.glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.BoolOp) and len(node.values) > 2
    ]
    assert chained == []
