"""Predicts times on GPUs that have not been measured, so that a measurement can refute them.

    python -m benchmarks.kernels.predictions > docs/gpu-predictions.md      compiles kernels: a minute or so

Bytes and products come from the shapes, and the time from a roofline (Williams, Waterman and Patterson, 2009)
with the achieved shares that the lab's cost models assume. Registers and shared memory are those of the
compiled kernels. ``python -m benchmarks.gpu`` prints the same numbers beside measured ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec
import torch
import triton

from aioengine.kernels.blocks import BlockWeight
from aioengine.kernels.triton import aot
from aioengine.kernels.triton.blocks import FEW_ROWS, default_blocks
from aioengine.kernels.triton.table import SHORT, Key, default_expand, default_shrink
from aioengine.lab.costs.roofline import H100_SXM, DeviceFigures
from aioengine.model.spec import ModelSpec, RopeSpec

LLAMA_8B = ModelSpec(
    family="llama", vocab_size=128256, hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8,
    head_dim=128, intermediate_size=14336, rms_norm_eps=1e-5, max_position=131072, rope=RopeSpec(),
    tie_embeddings=False,
)  # fmt: skip
TINY = msgspec.structs.replace(
    LLAMA_8B, vocab_size=256, hidden_size=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32,
    intermediate_size=256,
)  # fmt: skip
"""Shapes for trying the programs that measure."""
LAUNCH = 2.2e-6
"""Seconds between two launches of a recorded graph in which nothing is computed; assumed."""
BYTES = 2
"""Bytes of a bfloat16."""
GROUP = 128
"""Inputs that share a scale in a quantized checkpoint."""


class Gpu(NamedTuple):
    """A GPU, with what its occupancy depends on (CUDA C++ Programming Guide, technical specifications)."""

    figures: DeviceFigures
    capability: int
    shared: int
    """Shared memory of a multiprocessor, in bytes."""


GPUS = {
    "A100": Gpu(msgspec.structs.replace(H100_SXM, bandwidth=2.039e12, flops=312e12), 80, 164 * 1024),
    "H100": Gpu(H100_SXM, 90, 228 * 1024),
    "H200": Gpu(msgspec.structs.replace(H100_SXM, bandwidth=4.8e12), 90, 228 * 1024),
}
"""By a part of the name that torch gives them: those on SXM boards with 80, 80 and 141 GB, by NVIDIA's data
sheets (2.04, 3.35 and 4.8 TB/s; 312 and 989 TFLOPS in bfloat16 without sparsity)."""


class Kernel(NamedTuple):
    """Bytes that a launch moves, and its products."""

    name: str
    nbytes: float
    flops: float = 0.0


class Step(NamedTuple):
    """A decode step: ``batch`` sequences after ``context`` tokens each, over ``adapters`` of this rank."""

    batch: int
    context: int = 1000
    adapters: int = 0
    rank: int = 16


def gpu_of(name: str) -> Gpu | None:
    """Return the GPU of a device's name, such as "NVIDIA H100 80GB HBM3"; None if nothing is predicted, as
    for other boards of the same chip."""
    words = name.replace("-", " ").split()
    if not {"PCIe", "NVL", "40GB", "GH200", "MIG"}.isdisjoint(words):
        return None
    return next((gpu for key, gpu in GPUS.items() if key in words), None)


def with_layers(spec: ModelSpec, layers: int) -> ModelSpec:
    """Return the model with this number of layers."""
    return msgspec.structs.replace(spec, num_layers=layers)


def layer(spec: ModelSpec, step: Step) -> Iterator[Kernel]:
    """Yield the launches of a layer in a decode step; ``tests/gpu_without_gpu`` counts the real ones."""
    rows, hidden, inner = step.batch, spec.hidden_size, spec.intermediate_size
    qkv = spec.q_size + 2 * spec.kv_size
    for name, n_in, n_out in (
        ("qkv", hidden, qkv),
        ("o", spec.q_size, hidden),
        ("gate_up", hidden, 2 * inner),
        ("down", inner, hidden),
    ):
        yield product(name, rows, n_in, n_out)
        if step.adapters:
            slices = {"qkv": 3, "gate_up": 2}.get(name, 1)
            yield Kernel("shrink", BYTES * (rows * n_in + step.adapters * slices * step.rank * n_in))
            yield Kernel("expand", BYTES * (2 * rows * n_out + step.adapters * step.rank * n_out))
    for _ in range(2):
        yield Kernel("norm", 4 * BYTES * rows * hidden)
    yield Kernel("rope", 2 * BYTES * rows * qkv)
    yield Kernel("attention", BYTES * rows * (2 * step.context * spec.kv_size + 2 * spec.q_size))
    yield Kernel("activate", 3 * BYTES * rows * inner)


def product(name: str, rows: int, n_in: int, n_out: int) -> Kernel:
    """Return the product of ``rows`` with a plain weight."""
    return Kernel(name, BYTES * (n_in * n_out + rows * (n_in + n_out)), 2.0 * rows * n_in * n_out)


def seconds(kernel: Kernel, device: DeviceFigures) -> float:
    """Return the time of a launch, with the gap before it."""
    share = {
        "attention": device.kv_achieved,
        "shrink": device.lora_bandwidth_achieved,
        "expand": device.lora_bandwidth_achieved,
    }.get(kernel.name, device.weights_achieved)
    moving = kernel.nbytes / (device.bandwidth * share)
    achieved = device.attention_achieved if kernel.name == "attention" else device.linear_achieved
    return LAUNCH + max(moving, kernel.flops / (device.flops * achieved))


def step_seconds(gpu: Gpu, step: Step, spec: ModelSpec = LLAMA_8B) -> float:
    """Return the time of a played-back decode step up to its logits."""
    head = product("head", step.batch, spec.hidden_size, spec.vocab_size)
    rest = [head, Kernel("norm", 4 * BYTES * step.batch * spec.hidden_size)]
    each = sum(seconds(kernel, gpu.figures) for kernel in layer(spec, step))
    return spec.num_layers * each + sum(seconds(kernel, gpu.figures) for kernel in rest)


def prompt_seconds(gpu: Gpu, tokens: int, spec: ModelSpec = LLAMA_8B) -> float:
    """Return the device's time for a prompt, in which products and attention's products are bound by
    arithmetic."""
    figures = gpu.figures
    weights = spec.num_parameters() - 2 * spec.vocab_size * spec.hidden_size
    linear = 2.0 * tokens * weights / (figures.flops * figures.linear_achieved)
    pairs = tokens * (tokens + 1) / 2
    attention = 4.0 * pairs * spec.q_size * spec.num_layers / (figures.flops * figures.attention_achieved)
    return max(linear, BYTES * weights / (figures.bandwidth * figures.weights_achieved)) + attention


def block_weight(format: str, n: int, k: int, device: str) -> BlockWeight:
    """Return a weight as a quantized checkpoint has it, with a scale for each ``GROUP`` inputs."""
    data = torch.zeros(n, k // 2 if format == "int4" else k, dtype=torch.uint8, device=device)
    scale = torch.full((n, k // GROUP), 0.01, device=device)
    return BlockWeight(format, data, k, torch.bfloat16, scale=scale, group=GROUP, middle=8)


def quantized_product(format: str, rows: int, n_in: int, n_out: int) -> Kernel:
    """Return the product of ``rows`` with a quantized weight, which is read as it is stored."""
    nbytes = block_weight(format, n_out, n_in, "meta").nbytes + BYTES * rows * (n_in + n_out)
    return Kernel(format, nbytes, 2.0 * rows * n_in * n_out)


# Compiled kernels


def kernels() -> dict[str, aot.Variant]:
    """Return the forms of the kernels that steps of Llama 3 8B with adapters of rank 16 use."""
    found: dict[str, aot.Variant] = {}
    for phase, longest in (("decode", SHORT), ("prompt", SHORT + 1)):
        shrink = default_shrink(Key.of("shrink", 16, 16, LLAMA_8B.hidden_size, longest))
        found[f"shrink, {phase}"] = list(aot.of_shrink("bf16", shrink))[-1]
        expand = default_expand(Key.of("expand", 16, 16, 6144, longest))
        found[f"expand, {phase}"] = aot.of_expand("bf16", expand)
    plain = [v for v in aot.of_attention("bf16", 16, 128, 4) if not v.fp8 and "CAPPED" in dict(v.constants)]
    for name, variant in zip(("decode", "decode, split keys", "prompt"), plain, strict=True):
        found[f"attention, {name}"] = variant
    found["norm"] = aot.of_norm("bf16", LLAMA_8B.hidden_size)
    found["rope and store"] = next(aot.of_rope("bf16", 128))
    found["activation"] = aot.of_elementwise("bf16")[0]
    few, many = FEW_ROWS, FEW_ROWS + 1
    for format in FORMATS:
        for phase, rows in (("decode", few), ("prompt", many)):
            config = default_blocks(rows, 28672, GROUP, 16)
            found[f"{format} product, {phase}"] = aot.of_block(format, "bf16", config)
    return found


def occupancy(gpu: Gpu, registers: int, shared: int, warps: int) -> float:
    """Return the share of a multiprocessor's 64 warps that can be in it at a time.

    Registers are given out in units of 256 for a warp, and a block takes a KiB of shared memory more.
    """
    by_registers = aot.FILE_REGISTERS // (math.ceil(registers * 32 / 256) * 256 * warps)
    by_shared = gpu.shared // (shared + 1024)
    return min(by_registers, by_shared, 64 // warps, 32) * warps / 64


def compiled_row(name: str, variant: aot.Variant, capability: int) -> str:
    """Compile a kernel; return its row of the page's table."""
    gpu = next(gpu for gpu in GPUS.values() if gpu.capability == capability)
    usage = aot.compile_variant(variant, capability)
    share = occupancy(gpu, usage.registers, usage.shared_bytes, variant.num_warps)
    return (
        f"| {name} | sm_{capability} | {variant.num_warps} | {usage.registers} | {usage.spilled_bytes} | "
        f"{usage.shared_bytes / 1024:.1f} KiB | {share:.0%} |"
    )


# The page

STEPS = [
    Step(batch, context, adapters, rank)
    for batch, context in ((1, 1000), (8, 1000), (32, 1000), (64, 1000), (64, 4000))
    for adapters, rank in ((0, 16), (1, 16), (8, 16), (32, 16), (8, 64))
    if adapters <= batch
]
FORMATS = ("int4", "int8", "fp8")
_ABOUT = f"""# Predictions for GPUs

<!-- Written by `python -m benchmarks.kernels.predictions > docs/gpu-predictions.md`. -->

**Nothing here has been measured.** The engine has not run on a GPU yet. These numbers are there to be
refuted:

```
python -m benchmarks.gpu --write gpu.md
```

checks the kernels on a GPU, measures steps, prompts, products, and the launches of a layer, and prints each
beside what is predicted here, in under 9 minutes. A time above 1.3 times its prediction, which is in bold
there, shows a fault of the kernels, or of these assumptions.

Bytes and products follow from the shapes. Times are those of a roofline with the achieved shares of the peaks
that the lab's estimates assume ([lab-costs.md](lab-costs.md)), and {LAUNCH * 1e6:.1f} us for each launch of a
recorded graph.
"""
_STEPS_ABOUT = """Llama 3 8B in bfloat16, all 32 layers and the head, as a recorded step up to its logits; ms.
Adapters are on all linears. A layer takes 9 launches, and 17 with adapters."""
_QUANTIZED_ABOUT = f"""Their weights are read as they are stored, and multiplied with 16-bit
activations, in one launch. The product of one layer's gate and up, {2 * LLAMA_8B.intermediate_size:,} x
{LLAMA_8B.hidden_size:,}; ms. Scales are for {GROUP} inputs each."""
_KERNELS_ABOUT = """warps of a block, registers of a thread, bytes that did not fit
into registers, shared memory of a block, and the share of a multiprocessor's warps that can be in it at a
time."""


def page(compiled: Sequence[str]) -> str:
    """Return docs/gpu-predictions.md; ``compiled`` are the rows of its kernels."""
    head = " | ".join(GPUS)
    rule = "|".join(["---:"] * len(GPUS))
    lines = [_ABOUT, "## Decode steps", "", _STEPS_ABOUT, ""]
    lines += [f"| sequences | context | adapters | rank | {head} |", f"|---:|---:|---:|---:|{rule}|"]
    for step in STEPS:
        times = " | ".join(f"{step_seconds(gpu, step) * 1e3:.2f}" for gpu in GPUS.values())
        rank = step.rank if step.adapters else "-"
        lines.append(f"| {step.batch} | {step.context:,} | {step.adapters} | {rank} | {times} |")
    lines += ["", "## Prompts", "", "The device's time for one prompt, without adapters; ms.", ""]
    lines += [f"| tokens | {head} |", f"|---:|{rule}|"]
    for tokens in (512, 2048, 8192):
        times = " | ".join(f"{prompt_seconds(gpu, tokens) * 1e3:.1f}" for gpu in GPUS.values())
        lines.append(f"| {tokens:,} | {times} |")
    lines += [
        "",
        "## Quantized checkpoints",
        "",
        _QUANTIZED_ABOUT,
        "",
        f"| weights | rows | {head} |",
        f"|---|---:|{rule}|",
    ]
    n, k = 2 * LLAMA_8B.intermediate_size, LLAMA_8B.hidden_size
    for format in ("bfloat16", *FORMATS):
        for rows in (1, 64, 2048):
            kernel = (
                product(format, rows, k, n) if format == "bfloat16" else quantized_product(format, rows, k, n)
            )
            times = " | ".join(f"{seconds(kernel, gpu.figures) * 1e3:.3f}" for gpu in GPUS.values())
            lines.append(f"| {format} | {rows:,} | {times} |")
    lines += ["", "## Kernels", "", f"Compiled by Triton {triton.__version__}: {_KERNELS_ABOUT}", ""]
    lines += ["| kernel | for | warps | registers | spilled | shared | occupancy |"]
    lines += ["|---|---|---:|---:|---:|---:|---:|", *compiled]
    return "\n".join(lines) + "\n"


def main() -> None:
    rows = [compiled_row(name, v, capability) for name, v in kernels().items() for capability in (80, 90)]
    print(page(rows), end="")


if __name__ == "__main__":
    main()
