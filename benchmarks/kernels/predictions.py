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
from aioengine.kernels.triton import aot, targets
from aioengine.kernels.triton.quantized.blocks import FEW_ROWS, default_blocks
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


class Form(NamedTuple):
    """A form of quantized weights."""

    name: str
    format: str
    group: int = 128
    """Inputs that share a scale; 0: all of an output."""
    zeros: bool = False
    rounds: bool = False
    """Whether activations are rounded to eight bits, too, where there are many rows."""


FORMS = (
    Form("int4", "int4"),
    Form("int8", "int8"),
    Form("fp8", "fp8"),
    Form("fp8, W8A8", "fp8", rounds=True),
    Form("int4 at load", "int4", 64, zeros=True),
    Form("int8 at load, W8A8", "int8", 0, rounds=True),
    Form("fp8 at load, W8A8", "fp8", 0, rounds=True),
)
"""Those of checkpoints, and those that ``quantization`` makes of any checkpoint while it is loaded."""


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
    yield decode_attention(spec, step)
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


def block_weight(form: Form, n: int, k: int, device: str) -> BlockWeight:
    """Return a weight in this form."""
    group = form.group or k
    int4 = form.format == "int4"
    data = torch.zeros(n, k // 2 if int4 else k, dtype=torch.uint8, device=device)
    scale = torch.full((n, k // group), 0.01, device=device)
    zero = torch.full_like(scale, 8, dtype=torch.int16) if form.zeros else None
    return BlockWeight(
        *(form.format, data, k, torch.bfloat16), scale=scale, zero=zero, group=group,
        middle=8 if int4 and zero is None else 0, rounds=form.rounds,
    )  # fmt: skip


def quantized_product(form: Form, rows: int, n_in: int, n_out: int, capability: int) -> list[Kernel]:
    """Return the launches of a product with a quantized weight, which is read as it is stored. Where
    activations are rounded, tensor cores compute twice as much in a second."""
    stored, flops = block_weight(form, n_out, n_in, "meta").nbytes, 2.0 * rows * n_in * n_out
    eight_bits = capability >= (89 if form.format == "fp8" else 80)
    if not (form.rounds and rows > FEW_ROWS and eight_bits):
        return [Kernel(form.format, stored + BYTES * rows * (n_in + n_out), flops)]
    return [
        Kernel("round", (BYTES + 1) * rows * n_in),
        Kernel(form.format, stored + rows * (n_in + BYTES * n_out), flops / 2),
    ]


def decode_attention(spec: ModelSpec, step: Step, cache_bytes: int = BYTES) -> Kernel:
    """Return the attention of a layer, to a cache with so many bytes for a number."""
    cached = cache_bytes * 2 * step.context * spec.kv_size
    return Kernel("attention", step.batch * (cached + BYTES * 2 * spec.q_size))


# Compiled kernels


def kernels() -> dict[str, aot.Variant]:
    """Return the forms of the kernels that steps of Llama 3 8B with adapters of rank 16 use."""
    found: dict[str, aot.Variant] = {}
    for phase, longest in (("decode", SHORT), ("prompt", SHORT + 1)):
        shrink = default_shrink(Key.of("shrink", 16, 16, LLAMA_8B.hidden_size, longest))
        found[f"shrink, {phase}"] = list(aot.of_shrink("bf16", shrink))[-1]
        expand = default_expand(Key.of("expand", 16, 16, 6144, longest))
        found[f"expand, {phase}"] = aot.of_expand("bf16", expand)
    every = [v for v in aot.of_attention("bf16", 16, 128, 4) if not dict(v.constants)["WINDOWED"]]
    for cache, fp8 in (("", False), (", fp8 cache", True)):
        of_cache = [variant for variant in every if variant.fp8 == fp8]
        names = ("decode", "decode, split keys", "prompt, tiles of 64", "prompt, tiles of 128")
        for name, variant in zip(names, of_cache, strict=True):
            found[f"attention, {name}{cache}"] = variant
    found["norm"] = aot.of_norm("bf16", LLAMA_8B.hidden_size)
    found["rope and store"] = next(aot.of_rope("bf16", 128))
    found["activation"] = aot.of_elementwise("bf16")[0]
    few, many = FEW_ROWS, FEW_ROWS + 1
    for format in ("int4", "int8", "fp8"):
        for phase, rows in (("decode", few), ("prompt", many)):
            config = default_blocks(rows, 28672, 128, 16)
            found[f"{format} product, {phase}"] = aot.of_block(format, "bf16", config)
    for variant in aot.of_eight_bits("bf16"):
        constants = dict(variant.constants)
        if variant.kernel == "eight_bits":
            whole = "a scale for each output" if constants["WHOLE"] else "scales of groups"
            found[f"{'fp8' if variant.fp8 else 'int8'} W8A8, {whole}"] = variant
    return found


def occupancy(gpu: Gpu, registers: int, shared: int, warps: int) -> float:
    """Return the share of a multiprocessor's 64 warps that can be in it at a time.

    Registers are given out in units of 256 for a warp, and a block takes a KiB of shared memory more.
    """
    by_registers = targets.FILE_REGISTERS // (math.ceil(registers * 32 / 256) * 256 * warps)
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
_QUANTIZED_ABOUT = f"""Weights are read as they are stored, and multiplied with 16-bit activations, in
one launch. With W8A8, more than {FEW_ROWS} rows are rounded to eight bits in a launch of their own, and
multiplied in eight bits, float8 on Hopper only. The product of one layer's gate and up,
{2 * LLAMA_8B.intermediate_size:,} x {LLAMA_8B.hidden_size:,}; ms. Scales are for 128 inputs each in
checkpoints; those made at load are for each output, and with int4 for 64 inputs."""
_CACHE_ABOUT = """A layer's attention of decode steps, to a cache in bfloat16 and in float8; us."""
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
    lines += ["", "## Quantized weights", "", _QUANTIZED_ABOUT, ""]
    lines += [f"| weights | rows | {head} |", f"|---|---:|{rule}|"]
    n, k = 2 * LLAMA_8B.intermediate_size, LLAMA_8B.hidden_size
    for rows in (1, 64, 2048):
        plain = [product("bfloat16", rows, k, n)]
        times = " | ".join(f"{_sum(plain, gpu) * 1e3:.3f}" for gpu in GPUS.values())
        lines.append(f"| bfloat16 | {rows:,} | {times} |")
    for form in FORMS:
        for rows in (1, 64, 2048):
            found = [_sum(quantized_product(form, rows, k, n, gpu.capability), gpu) for gpu in GPUS.values()]
            times = " | ".join(f"{taken * 1e3:.3f}" for taken in found)
            lines.append(f"| {form.name} | {rows:,} | {times} |")
    lines += ["", "## A float8 cache", "", _CACHE_ABOUT, ""]
    lines += [f"| sequences | context | cache | {head} |", f"|---:|---:|---|{rule}|"]
    for step in (Step(1, 4000), Step(32, 1000), Step(64, 4000)):
        for name, size in (("bfloat16", BYTES), ("float8", 1)):
            kernel = decode_attention(LLAMA_8B, step, size)
            times = " | ".join(f"{_sum([kernel], gpu) * 1e6:.1f}" for gpu in GPUS.values())
            lines.append(f"| {step.batch} | {step.context:,} | {name} | {times} |")
    lines += ["", "## Kernels", "", f"Compiled by Triton {triton.__version__}: {_KERNELS_ABOUT}", ""]
    lines += ["| kernel | for | warps | registers | spilled | shared | occupancy |"]
    lines += ["|---|---|---:|---:|---:|---:|---:|", *compiled]
    return "\n".join(lines) + "\n"


def _sum(kernels: Sequence[Kernel], gpu: Gpu) -> float:
    return sum(seconds(kernel, gpu.figures) for kernel in kernels)


def main() -> None:
    rows = [
        compiled_row(name, variant, capability)
        for name, variant in kernels().items()
        for capability in (80, 90)
        if aot.compiles(variant, capability)
    ]
    print(page(rows), end="")


if __name__ == "__main__":
    main()
