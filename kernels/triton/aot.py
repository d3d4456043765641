"""Compiles the kernels for a GPU that need not be there, and reads what each would take of it.

For tests and ``benchmarks/gpu.py --compile``; serving does not need it. Uses the ptxas that comes with
triton.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from aioengine.kernels.triton.elementwise import affine_kernel, embed_kernel
from aioengine.kernels.triton.expand import expand_kernel
from aioengine.kernels.triton.shrink import shrink_kernel
from aioengine.kernels.triton.table import (
    AFFINE_COLUMNS,
    EMBED_RANKS,
    SHORT,
    ExpandConfig,
    Key,
    ShrinkConfig,
    default_expand,
    default_shrink,
)

CAPABILITIES = (80, 90)
"""Compute capabilities: A100 (8.0), H100 and H200 (9.0)."""

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
"""What one block may have; CUDA C++ Programming Guide, technical specifications by compute capability."""

REGISTERS = 255
"""What a thread may have."""

FILE_REGISTERS = 64 * 1024
"""Of a multiprocessor, for all threads in it."""

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 320, 512)
WIDTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
_DTYPES = {"bf16": 16, "fp16": 16, "fp32": 32}


class Variant(NamedTuple):
    """One specialisation of a kernel."""

    kernel: str
    dtype: str
    """Of activations and pools: "bf16", "fp16" or "fp32"."""
    constants: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        blocks = " ".join(f"{name}={value}" for name, value in self.constants)
        return f"{self.kernel} {self.dtype} {blocks} warps={self.num_warps} stages={self.num_stages}"


class Usage(NamedTuple):
    """What a block of a compiled kernel takes, and its PTX."""

    registers: int
    """Of a thread."""
    spilled_bytes: int
    """Of a thread: stores and loads of registers that did not fit."""
    shared_bytes: int
    ptx: str


def variants() -> list[Variant]:
    """All that the default table chooses over every rank, width, dtype and phase."""
    found: dict[Variant, None] = {}
    for dtype, bits in _DTYPES.items():
        for rank in RANKS:
            for width in WIDTHS:
                for longest in (SHORT, SHORT + 1):
                    shrink = default_shrink(Key.of("shrink", bits, rank, width, longest))
                    found.update(dict.fromkeys(of_shrink(dtype, shrink)))
                    expand = default_expand(Key.of("expand", bits, rank, width, longest))
                    found[of_expand(dtype, expand)] = None
        found.update(dict.fromkeys(of_elementwise(dtype)))
    return list(found)


def of_shrink(dtype: str, config: ShrinkConfig) -> Iterator[Variant]:
    """With the inputs whole, and split."""
    blocks = {"BLOCK_M": config.block_m, "BLOCK_R": config.block_r, "BLOCK_K": config.block_k}
    for split in sorted({1, config.split_k}):
        constants = (*blocks.items(), ("SPLIT_K", split))
        yield Variant("shrink", dtype, constants, config.num_warps, config.num_stages)


def of_expand(dtype: str, config: ExpandConfig) -> Variant:
    blocks = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_R": config.block_r}
    return Variant("expand", dtype, tuple(blocks.items()), config.num_warps, config.num_stages)


def of_elementwise(dtype: str) -> tuple[Variant, Variant]:
    """Affine, and embedding."""
    return (
        Variant("affine", dtype, (("BLOCK_M", SHORT), ("BLOCK_N", AFFINE_COLUMNS)), 4, 3),
        Variant("embed", dtype, (("BLOCK_M", SHORT), ("BLOCK_R", EMBED_RANKS)), 4, 3),
    )


def compile_variant(variant: Variant, capability: int) -> Usage:
    """Compiles (a second or so) for NVIDIA GPUs of this compute capability; tensors 16-byte aligned, sizes
    multiples of 16, as model dimensions are.

    Raises what triton raises if it does not compile, and RuntimeError if ptxas fails.
    """
    kernel = _KERNELS[variant.kernel]
    constants = dict(variant.constants)
    signature = {name: _type(name, variant.dtype, constants) for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name not in constants
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": variant.num_warps, "num_stages": variant.num_stages},
    )
    ptx = compiled.asm["ptx"]
    registers, spilled = _assemble(ptx)
    return Usage(registers, spilled, compiled.metadata.shared, ptx)


_KERNELS: Mapping[str, Any] = {
    "shrink": shrink_kernel,
    "expand": expand_kernel,
    "affine": affine_kernel,
    "embed": embed_kernel,
}
_POINTERS = {"tiles_ptr": "*i32", "arrivals_ptr": "*i32", "partials_ptr": "*fp32", "ids_ptr": "*i64"}


def _type(argument: str, dtype: str, constants: Mapping[str, int]) -> str:
    if argument in constants:
        return "constexpr"
    if argument.endswith("_ptr"):
        return _POINTERS.get(argument, f"*{dtype}")
    return "i32"


def _assemble(ptx: str) -> tuple[int, int]:
    """Registers of a thread, and bytes that it spills, by the first ptxas that knows this PTX version."""
    target = re.search(r"^\.target (sm_\w+)", ptx, re.MULTILINE)
    assert target is not None
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    errors = []
    for ptxas in sorted(folder.glob("ptxas*")):
        with tempfile.TemporaryDirectory() as scratch:
            source = Path(scratch) / "kernel.ptx"
            source.write_text(ptx, encoding="utf-8")
            command = [
                str(ptxas),
                "-v",
                f"-arch={target[1]}",
                str(source),
                "-o",
                str(source.with_suffix(".o")),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        registers = re.search(r"Used (\d+) registers", done.stderr)
        if done.returncode == 0 and registers is not None:
            spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)
            return int(registers[1]), sum(map(int, spilled))
        errors.append(f"{ptxas.name}: {done.stderr.strip()}")
    raise RuntimeError(f"no ptxas in {folder} takes the kernel: {'; '.join(errors) or 'there is none'}")
