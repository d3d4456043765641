"""The Triton kernels compiled for GPUs that are not here: they fit, spill nothing, and use tensor cores.

What a layer launches; with AIOENGINE_FUZZ_RUNS set, as ``make fuzz`` does, layers of many shapes.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.selection import mostly_slow

from aioengine.kernels.triton import launch
from aioengine.kernels.triton.table import SHORT

aot = pytest.importorskip("support.triton_launches")
targets = pytest.importorskip("support.triton_targets")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)

Work = tuple[Callable[..., None], dict[str, Any]]
ALL = bool(os.environ.get("AIOENGINE_FUZZ_RUNS"))
BF16, OTHERS = torch.bfloat16, (torch.float16, torch.float32)
WORKS: list[Work] = [(work, {"dtype": BF16, **fields}) for work, fields in aot.everything(few=not ALL)]
if ALL:
    WORKS += [(work, {**fields, "dtype": dtype}) for work, fields in WORKS for dtype in OTHERS]
else:
    WORKS += [(aot.of_lora, {"dtype": dtype, "rank": 64, "tokens": 40}) for dtype in OTHERS]
    WORKS += [(aot.of_attention, {"dtype": torch.float32, "head_dim": 128, "group": 4})]
DATA_CENTERS = ("sm_80", "sm_90")
LARGEST = [
    (work, fields) for work, fields in WORKS if {512, 128} & {*fields.values()} and not fields.get("float8")
]
"""What takes most of a GPU: large ranks and heads, and products with quantized weights."""
OTHER_GPUS = [*targets.GPUS] if ALL else ["sm_100", "sm_120", "gfx942"]
CASES = [(gpu, work) for gpu in DATA_CENTERS for work in WORKS]
CASES += [
    (gpu, work) for gpu in OTHER_GPUS if gpu not in DATA_CENTERS for work in (WORKS if ALL else LARGEST)
]
QUICK = [("sm_90", work) for work in WORKS[::8]]


def name_of(case: tuple[str, Work]) -> str:
    gpu, (work, fields) = case
    return f"{gpu} {work.__name__} {' '.join(map(str, fields.values()))}"


@pytest.mark.parametrize("case", mostly_slow(CASES, *QUICK), ids=name_of)
def test_launches(case: tuple[str, Work]) -> None:
    """GPUs of data centers, such with 99 KiB of shared memory, AMD's with 64, and B200, whose sums lie in a
    memory of their own."""
    gpu, (work, fields) = targets.GPUS[case[0]], case[1]
    launches = aot.launched(lambda: work(**fields), gpu)
    assert launches
    for found in launches:
        usage, blocks = found.compiled(gpu), dict(found.constants)
        assert usage.shared_bytes <= gpu.limits.shared_bytes, found
        full = "*fp32" in found.types[:1]
        products = ("shrink", "expand", "attention", *["block_linear"] * (blocks.get("BLOCK_K", 0) >= 64))
        if found.name in products:
            tensor_cores = re.search(r"mma\.sync|wgmma|tcgen05\.mma|v_mfma", usage.text)
            assert full or tensor_cores, found
        if case[0] in DATA_CENTERS:
            check_resources(found, usage, gpu)
        elif not ALL:  # a shrink for prompts spills 24 bytes on sm_120
            assert usage.spilled_bytes <= 32, found


def check_resources(found: aot.Launch, usage: targets.Usage, gpu: targets.Gpu) -> None:
    blocks = dict(found.constants)
    # Heads of 256 do not fit into registers in prompts: they spill up to 328 bytes, 532 with a float8 cache.
    # Elsewhere the assembler at times spills a few bytes for the sake of one more block, with registers left.
    large = found.name == "attention" and blocks["BLOCK_D"] > 128 and blocks["BLOCK_M"] >= 64
    few = 24 if usage.registers <= 168 else 0
    assert usage.spilled_bytes <= ((532 if "*u8" in found.types else 328) if large else few), found
    assert usage.registers <= targets.REGISTERS
    if blocks.get("BLOCK_M") == SHORT and "*fp32" not in found.types[:1]:
        # Decoding waits for memory: room for two blocks on a multiprocessor, so that one is always asking.
        assert 2 * usage.shared_bytes <= gpu.limits.shared_bytes, found
        assert 2 * usage.registers * 32 * blocks.get("num_warps", 4) <= targets.FILE_REGISTERS, found
    if blocks.get("SPLIT", 0) or blocks.get("SPLITS", 1) > 1:
        # All threads' stores come before the count that announces them, and their loads after it.
        order = r"st\.global.*bar\.sync.*atom\.global\.gpu\.acq_rel\.add.*bar\.sync.*ld\.global\.cg"
        assert re.search(order, usage.text, re.DOTALL), found


def test_products_are_added_before_they_are_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever Triton's default is."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    gpu = targets.GPUS["sm_90"]
    found = aot.launched(lambda: aot.of_attention(BF16, 128, 4), gpu)
    assert "fma.rn.f32" in next(one for one in found if one.name == "rope_store").compiled(gpu).text


def test_kernels_are_in_the_language_of_the_oldest_triton() -> None:
    """Triton 3.2 refuses ``a or b or c``."""
    folder = Path(inspect.getfile(launch)).parent / "jit"
    chained = [
        f"{path.name}:{node.lineno}"
        for path in sorted(folder.glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.BoolOp) and len(node.values) > 2
    ]
    assert chained == []
