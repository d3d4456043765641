"""The machine's highest speeds, and the phases of a step compared with them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from rich.table import Table

from aioengine.kernels.cpu.shared_library import load, threads
from aioengine.kernels.cpu.structs import PHASES
from aioengine.model.spec import LORA_MODULES, ModelSpec
from benchmarks.shared.report import new_table
from benchmarks.shared.steps import Steps

LANES = 16
READ_BYTES = 512 * 2**20
ROWS, CONTEXT, ADAPTERS, RANK = 32, 160, 8, 16
PROMPT = 4096


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


DECODE = StepShape(
    f"a decode step of {ROWS} sequences after {CONTEXT} tokens",
    *(ROWS, ROWS, ROWS * CONTEXT, ROWS * CONTEXT, ADAPTERS),
)
LONG_PROMPT = StepShape(f"a prompt of {PROMPT:,} tokens", *(PROMPT, 1, PROMPT, PROMPT * (PROMPT + 1) // 2, 1))


class Floors(NamedTuple):
    read_bytes: float
    """Bytes per second out of memory."""
    products: dict[str, float]
    """Multiplications and additions per second, by element type."""

    def table(self) -> Table:
        table = new_table(f"the machine's limits, {threads()} threads", "what", "per second", texts=0)
        table.add_row("read from memory", f"{self.read_bytes / 1e9:.1f} GB")
        for name, rate in self.products.items():
            table.add_row(f"{name} products", f"{rate / 1e9:.0f} billion")
        return table


def measure_floors() -> Floors:
    """Return the best of short runs, because other work on the machine only slows them down."""
    library = load()
    out = torch.zeros(1)
    memory = torch.ones(READ_BYTES // 4)
    read = _least(lambda: library.aio_probe_read(memory.data_ptr(), READ_BYTES, threads(), out.data_ptr()))
    count = 16_000_000
    products = {}
    for kind, (name, per_lane) in enumerate((("float32", 1), ("bfloat16", 2), ("int8", 4))):
        seconds = _least(lambda: library.aio_probe_dot(kind, count, threads(), out.data_ptr()))  # noqa: B023
        products[name] = count * LANES * per_lane * threads() / seconds
    return Floors(READ_BYTES / read, products)


def _least(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def profile_table(
    model: str, quantization: str, floors: Floors, repeats: int, shape: StepShape = DECODE
) -> Table:
    """Make a table of a step by phase, without and with adapters, with the larger of two floors for each."""
    adapters = shape.adapters
    kv_tokens = max(ROWS * 256, PROMPT if shape is LONG_PROMPT else 0)
    steps = Steps(model, kv_tokens=kv_tokens, slots=adapters, rank=RANK, quantization=quantization)
    native = steps.runner.native
    assert native is not None, "the compiled step does not cover this model"
    if shape is LONG_PROMPT:
        cases = {"base": steps.prefill(1, PROMPT), "adapters": steps.prefill(1, PROMPT, adapters)}
    else:
        cases = {"base": steps.decode(ROWS, CONTEXT), "adapters": steps.decode(ROWS, CONTEXT, adapters)}
    found: dict[str, list[list[float]]] = {name: [] for name in cases}
    walls: dict[str, list[float]] = {name: [] for name in cases}
    for run in range(repeats + 1):
        for name, case in cases.items():
            native.seconds = torch.zeros(len(PHASES), dtype=torch.float64)
            start = time.perf_counter()
            case()
            if run:
                walls[name].append(time.perf_counter() - start)
                found[name].append(native.seconds.tolist())
    medians = {
        name: [statistics.median(of) for of in zip(*runs, strict=True)] for name, runs in found.items()
    }
    wall = {name: statistics.median(runs) for name, runs in walls.items()}

    element = "int8" if quantization == "int8" else "bfloat16"
    weights = floor_seconds(steps.spec, floors, element, 1 if quantization.startswith("int8") else 2, shape)
    title = f"{shape.name} by phase, {quantization}; {adapters} adapters of rank {RANK}"
    table = new_table(title, "phase", "base, ms", "adapters, ms", "floor, ms", "of it")
    for i, phase in enumerate(PHASES):
        base, adapted = medians["base"][i], medians["adapters"][i]
        floor = weights.get(phase)
        shown = ("", "") if floor is None else (f"{floor[0] * 1e3:.1f}", floor[1])
        table.add_row(phase, f"{base * 1e3:.2f}", f"{adapted * 1e3:.2f}", *shown)
    rest = [wall[name] - sum(medians[name]) for name in ("base", "adapters")]
    table.add_row("outside of the library", *(f"{seconds * 1e3:.2f}" for seconds in rest))
    floor_sum = sum(seconds for seconds, _ in weights.values())
    table.add_row("step", *(f"{wall[n] * 1e3:.2f}" for n in ("base", "adapters")), f"{floor_sum * 1e3:.1f}")
    return table


def floor_seconds(
    spec: ModelSpec, floors: Floors, element: str, weight_bytes: int, shape: StepShape = DECODE
) -> dict[str, tuple[float, str]]:
    """Return for each phase the least time that it can take, and why: reading its data once, or its
    products."""
    least = {}
    for phase, (read, products, of) in phase_work(spec, element, weight_bytes, shape).items():
        reading, computing = read / floors.read_bytes, products / floors.products[of]
        least[phase] = (reading, "memory") if reading > computing else (computing, "arithmetic")
    return least


def phase_work(
    spec: ModelSpec, element: str, weight_bytes: int, shape: StepShape = DECODE
) -> dict[str, tuple[float, float, str]]:
    """Return for each phase: bytes read, number of products, and the type that is multiplied."""

    def linear(n_in: int, n_out: int, times: int, rows: int = shape.tokens) -> tuple[float, float, str]:
        size = n_in * n_out * times
        return size * weight_bytes, size * rows, element

    layers, hidden, inner = spec.num_layers, spec.hidden_size, spec.intermediate_size
    lora = [spec.linear(module) for module in LORA_MODULES]
    a, b = (layers * RANK * sum(shape[side] for shape in lora) for side in (0, 1))
    each = layers * spec.kv_size
    group = spec.num_heads // spec.num_kv_heads
    return {
        "qkv": linear(hidden, spec.q_size + 2 * spec.kv_size, layers),
        "attention": (2 * shape.cells * each * 2, 2 * shape.pairs * each * group, "bfloat16"),
        "o": linear(spec.q_size, hidden, layers),
        "gate_up": linear(hidden, 2 * inner, layers),
        "down": linear(inner, hidden, layers),
        "head": linear(hidden, spec.vocab_size, 1, shape.sampled),
        "shrink": (a * shape.adapters * 2, a * shape.tokens, "bfloat16"),
        "expand": (b * shape.adapters * 2, b * shape.tokens, "bfloat16"),
    }
