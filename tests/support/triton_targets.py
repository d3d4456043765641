"""GPUs that kernels are compiled for ahead of time, and what a compiled kernel takes of one.

Uses the ptxas and the LLVM that come with triton.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from aioengine.kernels.triton.launch import HOPPER, OLDEST, OPTIONS, Limits


class Gpu(NamedTuple):
    """A kind of GPU, with what its driver would say."""

    target: GPUTarget
    capability: int
    """Compute capability that the kernels go by."""
    limits: Limits


def _nvidia(capability: int, limits: Limits) -> Gpu:
    return Gpu(GPUTarget("cuda", capability, 32), capability, limits)


def _amd(name: str) -> Gpu:
    return Gpu(GPUTarget("hip", name, 64), OLDEST, Limits(64 * 1024, 64))


_SMALL = Limits(99 * 1024, 32)
GPUS = {
    "sm_80": _nvidia(80, Limits(163 * 1024, 32)),  # A100
    "sm_86": _nvidia(86, _SMALL),  # A10, RTX 3090
    "sm_89": _nvidia(89, _SMALL),  # L4, RTX 4090
    "sm_90": _nvidia(90, HOPPER),  # H100, H200
    "sm_100": _nvidia(100, HOPPER),  # B200
    "sm_120": _nvidia(120, _SMALL),  # RTX 5090
    "gfx90a": _amd("gfx90a"),  # MI200
    "gfx942": _amd("gfx942"),  # MI300
}
"""By name; shared memory of a block as in the CUDA C++ Programming Guide (technical specifications), and
AMD's LDS of a workgroup (CDNA 3 ISA)."""

REGISTERS = 255
"""Registers that a thread may have."""

FILE_REGISTERS = 64 * 1024
"""Registers of a multiprocessor, for all threads in it."""


class Usage(NamedTuple):
    """Resources that a block of a compiled kernel takes, and what it was compiled to."""

    registers: int
    """Registers of a thread."""
    spilled_bytes: int
    """Bytes that a thread stores and loads because its registers did not fit."""
    shared_bytes: int
    text: str
    """NVIDIA's assembler, or AMD's."""


def usage_of(source: ASTSource, target: GPUTarget, num_warps: int, num_stages: int) -> Usage:
    """Compile a kernel up to its assembler; raises what triton does, and RuntimeError if ptxas fails."""
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.add_stages_inspection_hook = _reporting
        options = {"num_warps": num_warps, "num_stages": num_stages, **OPTIONS}
        compiled = triton.compile(source, target=target, options=options)
    asm = compiled.asm
    if target.backend == "cuda":
        registers, spilled = map(int, asm["cubin"].split())
        text = asm["ptx"]
    else:
        text = asm["amdgcn"]
        numbers = {name: int(n) for name, n in re.findall(r"\.(vgpr\w*_count):\s+(\d+)", text)}
        registers, spilled = numbers["vgpr_count"], 4 * numbers["vgpr_spill_count"]
    return Usage(registers, spilled, compiled.metadata.shared, text)


def _reporting(backend: object = None, stages: dict[str, Any] | None = None, *_: object) -> tuple[str, str]:
    """Hook of Triton's compiler: where it would make a binary, ask the assembler for a thread's registers and
    spilled bytes. (AMD's says them in its text.) Triton's cache keeps them as it would keep the binary, by
    another key."""
    if stages is not None and "cubin" in stages:
        stages["cubin"] = lambda ptx, metadata: " ".join(map(str, _assemble(ptx))).encode()
    elif stages is not None:
        stages["hsaco"] = lambda text, metadata: b"-"
    return "usage", "usage"


def _assemble(ptx: str) -> tuple[int, int]:
    """Return a thread's registers and spilled bytes, by the first ptxas that knows this PTX version."""
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
