"""Time of a decode step on more cores: measured on this machine's cores, and predicted beyond them by a
model.

    python -m benchmarks.kernels.scaling
    python -m benchmarks.kernels.scaling --quantization int8 --cores 8 32 --memory 100 400

The model: a phase that takes t on one core takes max(t / p, bytes / B) on p cores. bytes is what it reads
(weights, keys and values, adapters). B is the memory bandwidth of p cores: p times that of one core, at most
the socket's. Time outside of the library (tables, sampling) is not divided. After a step's operations the
cores wait for each other: for W in all on two cores, and W log2(p) on p. W is fitted to the measured time
that the rest of the model does not explain. All times are the least of many steps, because other work can
only add to them.
"""

from __future__ import annotations

import argparse
import math
import time
from typing import NamedTuple

import torch
from rich.table import Table

from aioengine.kernels.cpu.structs import PHASES
from benchmarks.kernels.floors import ADAPTERS, CONTEXT, ROWS, Floors, measure_floors, phase_work
from benchmarks.shared.report import arguments, console, cpu_name, new_table
from benchmarks.shared.steps import Steps

OPERATIONS_OF_A_LAYER = 13
"""Approximate number of operations after which the threads of a step wait for each other."""


class Measured(NamedTuple):
    """Seconds of a step with some number of threads."""

    phases: list[float]
    rest: float
    """Seconds outside of the library."""

    @property
    def step(self) -> float:
        return sum(self.phases) + self.rest


def measure(steps: Steps, adapters: int, threads: int, repeats: int) -> Measured:
    """Measure the least seconds of each phase, and of the rest."""
    native = steps.runner.native
    assert native is not None, "the compiled step does not cover this model"
    case = steps.decode(ROWS, CONTEXT, adapters)
    torch.set_num_threads(threads)
    phases, rest = [math.inf] * len(PHASES), math.inf
    for run in range(repeats + 1):
        native.seconds = torch.zeros(len(PHASES), dtype=torch.float64)
        start = time.perf_counter()
        case()
        wall = time.perf_counter() - start
        if run:
            found = native.seconds.tolist()
            phases = [min(pair) for pair in zip(phases, found, strict=True)]
            rest = min(rest, wall - sum(found))
    return Measured(phases, rest)


def predict(one: Measured, read: dict[str, float], memory: float, cores: int, wait: float) -> float:
    """Predict the seconds of a step on ``cores`` cores with ``memory`` bytes per second of bandwidth in
    all."""
    phases = (
        max(seconds / cores, read.get(phase, 0.0) / memory)
        for phase, seconds in zip(PHASES, one.phases, strict=True)
    )
    return sum(phases) + one.rest + wait * math.log2(cores)


def table(args: argparse.Namespace, floors: dict[int, Floors], quantization: str, adapters: int) -> Table:
    """Make a table of tokens per second by cores: measured, then predicted for each bandwidth."""
    steps = Steps(args.model, kv_tokens=ROWS * 256, slots=ADAPTERS, quantization=quantization)
    found = {threads: measure(steps, adapters, threads, args.repeats) for threads in floors}
    one = found[1]
    element, size = ("int8", 1) if quantization == "int8" else ("bfloat16", 2)
    read = {phase: work[0] for phase, work in phase_work(steps.spec, element, size).items()}
    most = max(floors)
    ideal = predict(one, read, floors[most].read_bytes, most, 0.0)
    wait = max(0.0, found[most].step - ideal) / math.log2(most) if most > 1 else 0.0
    weights = "bfloat16" if quantization == "none" else quantization
    title = f"decode of {ROWS} after {CONTEXT} tokens, {weights}, {adapters or 'no'} adapters: tok/s"
    columns = ("cores", "measured", *(f"{gigabytes} GB/s" for gigabytes in args.memory))
    result = new_table(title, *columns, texts=0)
    for threads, measured in found.items():
        result.add_row(str(threads), f"{ROWS / measured.step:.0f}")
    for cores in args.cores:
        cells = []
        for gigabytes in args.memory:
            memory = min(gigabytes * 1e9, cores * floors[1].read_bytes)
            cells.append(f"{ROWS / predict(one, read, memory, cores, wait):.0f}")
        result.add_row(str(cores), "", *cells)
    operations = steps.spec.num_layers * OPERATIONS_OF_A_LAYER
    result.caption = (
        f"not divided: {one.rest * 1e3:.2f} ms; on {most} cores {ROWS / ideal:.0f} tok/s but for waits: "
        f"{wait * 1e3:.2f} ms, {wait / operations * 1e6:.1f} us for each of {operations}"
    )
    return result


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--quantization", nargs="+", default=["none", "int8"], metavar="Q")
    parser.add_argument("--cores", type=int, nargs="+", default=[4, 8, 16, 32], help="to predict for")
    parser.add_argument("--memory", type=float, nargs="+", default=[50, 200, 400], help="GB/s of a socket")
    parser.add_argument("--repeats", type=int, default=40)
    args = parser.parse_args()
    here = torch.get_num_threads()
    floors = {}
    for threads in sorted({1, here}):
        torch.set_num_threads(threads)
        floors[threads] = measure_floors()
    out = console()
    read = ", ".join(f"{threads}: {one.read_bytes / 1e9:.1f} GB/s" for threads, one in floors.items())
    out.print(f"{cpu_name()}; threads and what they read: {read}\n")
    for quantization in args.quantization:
        for adapters in (0, ADAPTERS):
            out.print(table(args, floors, quantization, adapters))


if __name__ == "__main__":
    main()
