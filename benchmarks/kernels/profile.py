"""Phases of a step, beside what the machine's memory and arithmetic allow."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from aioengine.kernels import Weight
from aioengine.kernels.cpu.cores import threads
from aioengine.kernels.cpu.packed import PackedWeight
from aioengine.kernels.cpu.quantized import QuantizedWeight
from aioengine.kernels.cpu.shared_library import has_int8_products
from aioengine.kernels.cpu.structs import PHASES
from aioengine.model.spec import LORA_MODULES, ModelSpec
from benchmarks.kernels.steps import Steps
from benchmarks.report import Table, median

SIDE, ROWS = 512, 2048
"""Of a weight that is in the cache, and the rows that are multiplied by it."""
READ_BYTES = 512 * 2**20
RANK = 16


class StepShape(NamedTuple):
    """What a step computes."""

    name: str
    tokens: int
    sampled: int
    """Tokens that go through the head."""
    cells: int
    """Keys that are read at least once, and as many values."""
    pairs: int
    """Tokens with the keys that each attends to."""
    adapters: int


DECODE = StepShape("A decode step of 32 sequences after 160 tokens", 32, 32, 32 * 160, 32 * 160, 8)


class Floors(NamedTuple):
    """The machine's limits, a second."""

    read_bytes: float
    products: dict[str, float]
    """Multiplications and additions that the library makes with weights in the cache, by element type."""


def measure_floors() -> Floors:
    """Return the best of short runs, because other work on the machine only slows them down."""
    memory = torch.ones(READ_BYTES // 8, dtype=torch.int64)
    read = _least(memory.sum)
    plain = torch.ones(SIDE, SIDE)
    half, room = plain.bfloat16(), torch.empty(SIDE * SIDE, dtype=torch.uint8)
    weights: dict[str, Weight] = {
        "int8": QuantizedWeight.pack(half, room, int8_activations=has_int8_products()),
        "float32": PackedWeight.pack(plain),
        "bfloat16": PackedWeight.pack(half.clone()),
    }
    products = {}
    for name, weight in weights.items():
        x = torch.ones(ROWS, SIDE, dtype=torch.float32 if name == "float32" else torch.bfloat16)
        products[name] = ROWS * SIDE * SIDE / _least(partial(weight.linear, x, None))
    return Floors(READ_BYTES / read, products)


def _least(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def profile(*, model: str = "smollm2-135m", quantization: str = "none", rounds: int = 7) -> Iterator[Table]:
    """A decode step by phase, beside what the machine's memory and arithmetic allow."""
    yield from phases(model, quantization, rounds, DECODE)


def prompt(
    *, model: str = "smollm2-135m", quantization: str = "none", tokens: int = 4096, rounds: int = 7
) -> Iterator[Table]:
    """A prompt by phase, beside the same limits."""
    pairs = tokens * (tokens + 1) // 2
    shape = StepShape(f"A prompt of {tokens:,} tokens", tokens, 1, tokens, pairs, 1)
    yield from phases(model, quantization, rounds, shape)


def phases(model: str, quantization: str, rounds: int, shape: StepShape) -> Iterator[Table]:
    floors = measure_floors()
    limits = [["read from memory", f"{floors.read_bytes / 1e9:.1f} GB"]]
    limits += [[f"{name} products", f"{rate / 1e9:.0f} billion"] for name, rate in floors.products.items()]
    yield Table(f"The machine's limits, {threads()} threads", ["what", "a second"], limits)
    steps = Steps(model, kv_tokens=32 * 256, slots=shape.adapters, rank=RANK, quantization=quantization)
    native = steps.runner.model
    assert native is not None, "the compiled step does not cover this model"
    size = (1, shape.tokens, 0) if shape is not DECODE else (32, 1, 160)
    work = {count: steps.step(*size, count) for count in (0, shape.adapters)}
    found: dict[int, list[list[float]]] = {count: [] for count in work}
    for run in range(rounds + 1):
        for count, step in work.items():
            native.seconds = torch.zeros(len(PHASES), dtype=torch.float64)
            start = time.perf_counter()
            step()
            if run:
                seconds = native.seconds.tolist()
                wall = time.perf_counter() - start
                found[count].append([*seconds, wall - sum(seconds), wall])
    columns = [[median(of) for of in zip(*runs, strict=True)] for runs in found.values()]
    least = floor_seconds(steps.spec, floors, quantization, shape)
    least["step"] = sum(seconds for seconds, _ in least.values()), ""
    rows = []
    for phase, *times in zip((*PHASES, "outside of the library", "step"), *columns, strict=True):
        floor, why = least.get(phase, (0.0, ""))
        rows.append(
            [
                phase,
                *(f"{1e3 * seconds:.2f}" for seconds in times),
                f"{1e3 * floor:.1f}" if floor else "",
                why,
            ]
        )
    title = f"{shape.name}, {quantization}; {shape.adapters} adapters of rank {RANK}"
    yield Table(title, ["phase", "base, ms", "adapters, ms", "floor, ms", "of it"], rows)


def floor_seconds(
    spec: ModelSpec, floors: Floors, quantization: str, shape: StepShape
) -> dict[str, tuple[float, str]]:
    """Return for each phase the least time that it can take, and why: reading its data once, or products."""
    element = "int8" if quantization == "int8" else "bfloat16"
    weight_bytes = 1 if quantization == "int8" else 2
    layers, hidden, inner = spec.num_layers, spec.hidden_size, spec.intermediate_size
    lora = [spec.linear(module) for module in LORA_MODULES]
    a, b = (layers * RANK * sum(sizes[side] for sizes in lora) for side in (0, 1))
    each, group = layers * spec.kv_size, spec.num_heads // spec.num_kv_heads

    def linear(n_in: int, n_out: int, times: int, rows: int = shape.tokens) -> tuple[float, float, str]:
        size = n_in * n_out * times
        return size * weight_bytes, size * rows, element

    work = {
        "qkv": linear(hidden, spec.q_size + 2 * spec.kv_size, layers),
        "attention": (2 * shape.cells * each * 2, 2 * shape.pairs * each * group, "bfloat16"),
        "o": linear(spec.q_size, hidden, layers),
        "gate_up": linear(hidden, 2 * inner, layers),
        "down": linear(inner, hidden, layers),
        "head": linear(hidden, spec.vocab_size, 1, shape.sampled),
        "shrink": (a * shape.adapters * 2, a * shape.tokens, "bfloat16"),
        "expand": (b * shape.adapters * 2, b * shape.tokens, "bfloat16"),
    }
    least = {}
    for phase, (read, products, of) in work.items():
        reading, computing = read / floors.read_bytes, products / floors.products[of]
        least[phase] = (reading, "memory") if reading > computing else (computing, "arithmetic")
    return least


CASES = (profile, prompt)
