"""The Triton kernels on a GPU: checked, timed, and tuned. Whole steps, too.

    python -m benchmarks.kernels.gpu                        check every operation, then time everything
    python -m benchmarks.kernels.gpu --parts checks steps   some of: checks, linears, layer, products, steps,
                                                    prompts
    python -m benchmarks.kernels.gpu --parts linears --ranks 16 64 --adapters 1 8 32 --tokens 32 2048
    python -m benchmarks.kernels.gpu --tune table.json      find block sizes for this GPU; serve with them by
                                                    AIOENGINE_TRITON_TABLE=table.json
    python -m benchmarks.kernels.gpu --compile 80 90        registers and shared memory; needs no GPU

Prints Markdown, with predictions beside the times (docs/gpu-predictions.md). ``python -m benchmarks.gpu``
runs all parts, each in a process of its own, and more.

Times of operations are medians with a cold L2 cache, as in serving, where a layer's matrices were last read a
step ago. Exits with 1 if anything failed and with 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import triton
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from aioengine.kernels import Backend, LoRABatch, LoRAPool, SlotMemory, get_backend
from aioengine.kernels.triton import lora
from aioengine.kernels.triton.table import (
    ORDER,
    SHORT,
    ExpandConfig,
    Key,
    ShrinkConfig,
    default_expand,
    default_shrink,
)
from aioengine.model.spec import ModelSpec
from benchmarks.kernels import gpu_steps
from benchmarks.kernels.gpu_machine import Machine, Timer
from benchmarks.kernels.predictions import LLAMA_8B, TINY, Kernel, product
from benchmarks.kernels.sheets import Row, Sheet, Wrong, against, markdown, measured

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Allowed errors, as shares of the largest value."""
SHAPES = {"llama-8b": LLAMA_8B, "tiny": TINY}

Config = TypeVar("Config", ShrinkConfig, ExpandConfig)
Item = TypeVar("Item")


def linears(spec: ModelSpec) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Inputs, and outputs of each slice, of a layer's fused linears."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    return {
        "qkv": (hidden, (spec.q_size, spec.kv_size, spec.kv_size)),
        "o": (spec.q_size, (hidden,)),
        "gate_up": (hidden, (inner, inner)),
        "down": (inner, (hidden,)),
    }


class Problem(NamedTuple):
    """One fused linear under a batch."""

    x: Tensor
    weight: Tensor
    pool: LoRAPool
    batch: LoRABatch

    @property
    def h_bytes(self) -> int:
        return self.x.nbytes // self.x.shape[1] * len(self.pool.modules) * self.batch.width

    @property
    def shrink_bytes(self) -> int:
        """Bytes that must be read and written at least: x, the active adapters' A, and h."""
        rows = len(self.pool.modules) * sum(segment.rank for segment in self.batch.segments)
        return self.x.nbytes + self.h_bytes + self.x.element_size() * rows * self.pool.in_features

    @property
    def expand_bytes(self) -> int:
        """h, the active adapters' B, and y twice."""
        size, width = self.x.element_size(), sum(self.pool.widths)
        b = sum(segment.rank for segment in self.batch.segments) * width
        return self.h_bytes + size * (2 * len(self.x) * width + b)


def problem(
    linear: tuple[int, tuple[int, ...]],
    tokens: int,
    adapters: int,
    rank: int,
    dtype: torch.dtype,
    device: str,
    *,
    base_tokens: int = 0,
    affine: bool = False,
) -> Problem:
    """``tokens`` spread evenly over ``adapters``, after ``base_tokens``; one more slot is unused: NaN."""
    n_in, widths = linear
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    used, n = min(adapters, tokens), len(widths)
    elements = n * rank * n_in + rank * sum(widths) + 2 * sum(widths)
    memory = randn((used + 1) * elements) / n_in**0.5
    memory[used * elements :] = float("nan")
    slots = SlotMemory(memory, used, n, rank, aligned=True)
    rows, end = [], n * rank * n_in
    for j, width in enumerate(widths):
        affine_at = elements - 2 * sum(widths[j:])
        rows.append([j * rank * n_in, rank, end, rank, affine_at, -1])
        end += rank * width
    for slot in range(used):
        slots.table[slot], slots.device_table[slot] = slots.rows(torch.tensor(rows), slot * elements)
    counts = [tokens // used + (i < tokens % used) for i in range(used)]
    batch = LoRABatch(
        [-1, *range(used)],
        [base_tokens, *counts],
        [rank] * used,
        device,
        slot_affine=[affine] * used,
    )
    offsets = tuple(sum(widths[:j]) for j in range(n))
    names = tuple(str(j) for j in range(n))
    pool = LoRAPool(slots, names, 0, n_in, tuple(widths), offsets, tuple(widths), offsets)
    weight = randn(sum(widths), n_in) / n_in**0.5
    return Problem(randn(base_tokens + tokens, n_in), weight, pool, batch)


def checks(args: argparse.Namespace, machine: Machine) -> Iterator[Sheet]:
    """Compare every operation with the reference, and recorded steps with launched ones."""

    def rows() -> Iterator[Row]:
        for dtype in TOLERANCE:
            for rank in args.ranks:
                check = partial(largest_error, machine, rank, dtype, max(args.tokens))
                yield Row((f"LoRA, rank {rank}", str(dtype).removeprefix("torch.")), check)
        yield from gpu_steps.layer_checks(machine, TOLERANCE)
        yield from gpu_steps.step_checks(machine, args.layers)

    yield Sheet("Results beside the reference", ("operations", "case", "largest error"), rows())


def largest_error(machine: Machine, rank: int, dtype: torch.dtype, most: int) -> tuple[str]:
    """Run the LoRA operations, with up to ``most`` tokens, beside the oracle. Raises Wrong if they differ."""
    device, shapes = machine.device, linears(machine.spec)
    oracle, largest = get_backend(device, "reference"), 0.0
    for linear, tokens, adapters in (("qkv", 1, 1), ("gate_up", 33, 5), ("down", most, 3)):
        p = problem(shapes[linear], tokens, adapters, rank, dtype, device, base_tokens=3, affine=True)
        y = p.x.new_ones(len(p.x), p.weight.shape[0])
        ids = torch.arange(len(p.x), device=device) % p.pool.in_features
        results = []
        for backend in (oracle, lora):
            h = backend.lora_shrink(p.x, p.pool, p.batch)
            expanded, scaled = y.clone(), y.clone()
            backend.lora_expand(h, p.pool, expanded, p.batch)
            backend.lora_affine(scaled, p.pool, p.batch)
            embedded = backend.lora_embed(ids, p.pool, p.batch)
            results.append({"shrink": h, "expand": expanded, "affine": scaled, "embed": embedded})
        for op, expected in results[0].items():
            difference = (results[1][op].float() - expected.float()).abs().max()
            error = float(difference / expected.float().abs().max().clamp(min=1e-9))
            largest = max(largest, error)
            if not error <= TOLERANCE[dtype]:  # NaN, too
                case = f"{linear}, {tokens} tokens, {adapters} adapters, rank {rank}, {dtype}"
                raise Wrong(f"{op} of {case}: off by {error:.2g} of the largest value")
    return (f"{largest:.1g}",)


def lora_sheet(args: argparse.Namespace, machine: Machine) -> Iterator[Sheet]:
    """Cost of LoRA on top of the base linear."""
    dtype: torch.dtype = getattr(torch, args.dtype)
    columns = ("linear", "tokens", "adapters", "rank", "base", "predicted", "ratio", "shrink", "predicted")
    columns += ("ratio", "expand", "predicted", "ratio", "LoRA/base", "plain torch", "host")
    shapes = linears(machine.spec)

    def cells(linear: str, tokens: int, adapters: int, rank: int) -> list[str]:
        p = problem(shapes[linear], tokens, adapters, rank, dtype, machine.device)
        y = F.linear(p.x, p.weight)
        h = lora.lora_shrink(p.x, p.pool, p.batch)
        base = machine.seconds(partial(F.linear, p.x, p.weight))
        shrink = machine.seconds(partial(lora.lora_shrink, p.x, p.pool, p.batch))
        expand = machine.seconds(partial(lora.lora_expand, h, p.pool, y, p.batch))
        plain = machine.seconds(partial(add_lora, get_backend(machine.device, "torch"), p, y))
        host = machine.host(partial(add_lora, lora, p, y))
        # Of a launch of its own, without the gap that a recorded step has before it.
        kernels = (
            (base, product("base", tokens, p.pool.in_features, y.shape[1])),
            (shrink, Kernel("shrink", p.shrink_bytes)),
            (expand, Kernel("expand", p.expand_bytes)),
        )
        found = [cell for time, kernel in kernels for cell in against(time, machine.predicted(kernel), 1e-6)]
        return [*found, f"{(shrink + expand) / base:.0%}", f"{plain * 1e6:.1f}", f"{host * 1e6:.1f}"]

    cases = (
        Row((linear, str(tokens), str(adapters), str(rank)), partial(cells, linear, tokens, adapters, rank))
        for linear in args.linears
        for tokens in args.tokens
        for adapters in args.adapters
        for rank in args.ranks
        if adapters <= tokens
    )
    yield Sheet(f"Linears with adapters, {args.dtype}; us", columns, cases)


def add_lora(backend: Backend, p: Problem, y: Tensor) -> None:
    h = backend.lora_shrink(p.x, p.pool, p.batch)
    backend.lora_expand(h, p.pool, y, p.batch)


def tune(args: argparse.Namespace, machine: Machine) -> dict[str, dict[str, int]]:
    """The best configuration found for every rank, width and phase that is asked for. Prompts are summed in
    the order of decoding, which is tuned first."""
    dtype: torch.dtype = getattr(torch, args.dtype)
    bits, found = 8 * dtype.itemsize, {}
    shapes, timer = linears(machine.spec), machine.seconds
    cases = [
        (linear, rank, tokens, adapters)
        for linear in args.linears
        for rank in args.ranks
        for tokens, adapters in ((32, 8), (2048, 4))
    ]
    for linear, rank, tokens, adapters in _track(cases, "tuning"):
        p = problem(shapes[linear], tokens, adapters, rank, dtype, machine.device)
        y = F.linear(p.x, p.weight)
        h = lora.lora_shrink(p.x, p.pool, p.batch)
        longest = max(s.stop - s.start for s in p.batch.segments)
        shrink = partial(lora.shrink, p.x, p.pool, p.batch)
        key = Key.of("shrink", bits, rank, p.pool.in_features, longest)
        found[str(key)] = descend(_ordered(default_shrink(key), key, found), key, shrink, timer)._asdict()
        expand = partial(lora.expand, h, p.pool, y, p.batch)
        key = Key.of("expand", bits, rank, y.shape[1], longest)
        found[str(key)] = descend(_ordered(default_expand(key), key, found), key, expand, timer)._asdict()
    return found


def _ordered(start: Config, key: Key, found: Mapping[str, Mapping[str, int]]) -> Config:
    """``start`` with what the order of sums depends on as it was found for decoding."""
    decode = found.get(str(key._replace(phase="decode")))
    return start if decode is None else start._replace(**{field: decode[field] for field in ORDER[key.op]})


def descend(start: Config, key: Key, run: Callable[[Config], object], timer: Timer) -> Config:
    """Halve and double one field after the other as long as that is faster by 1% at least. With the order
    that is best for decoding the start may be too large for the GPU; whatever fits is faster."""

    def seconds_of(config: Config) -> float:
        try:
            return timer(partial(run, config))
        except (triton.OutOfResources, triton.CompilationError):
            return math.inf

    best, least, improved = start, seconds_of(start), True
    while improved:
        improved = False
        for field in start._fields:
            if key.phase == "prefill" and field in ORDER[key.op]:
                continue
            value = getattr(best, field)
            low = SHORT if field.startswith("block_") else 1
            high = {"num_stages": 6, "num_warps": 8, "split_k": 32}.get(field, 256)
            steps = (value - 1, value + 1) if field == "num_stages" else (value // 2, value * 2)
            for candidate in (step for step in steps if low <= step <= high):
                config = best._replace(**{field: candidate})
                seconds = seconds_of(config)
                if seconds < 0.99 * least:
                    best, least, improved = config, seconds, True
    return best


def compiled(capabilities: Sequence[int]) -> Sheet:
    """What the default configurations take of GPUs of these compute capabilities."""
    from aioengine.kernels.triton import aot

    def cells(variant: aot.Variant, capability: int) -> tuple[str, ...]:
        usage = aot.compile_variant(variant, capability)
        return (
            str(usage.registers),
            f"{usage.spilled_bytes} B",
            f"{usage.shared_bytes / 1024:.1f} KiB",
        )

    cases = [(variant, capability) for variant in aot.variants() for capability in capabilities]
    rows = (
        Row((str(variant), str(capability / 10)), partial(cells, variant, capability))
        for variant, capability in _track(cases, "compiling")
    )
    columns = ("kernel", "compute capability", "registers", "spilled", "shared memory")
    return Sheet("Compiled ahead of time", columns, rows)


def _track(items: Sequence[Item], what: str) -> Iterator[Item]:
    console = Console(stderr=True)
    yield from track(items, what, console=console, disable=not console.is_terminal)


PARTS: Mapping[str, Callable[[argparse.Namespace, Machine], Iterator[Sheet]]] = {
    "checks": checks,
    "steps": gpu_steps.step_sheets,
    "prompts": gpu_steps.prompt_sheet,
    "products": gpu_steps.product_sheet,
    "layer": gpu_steps.layer_sheet,
    "linears": lora_sheet,
}
"""Parts that can be measured, the most important first."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--shapes", choices=SHAPES, default="llama-8b", help="tiny: to try the program")
    parser.add_argument("--linears", nargs="+", choices=linears(LLAMA_8B), default=["qkv", "down"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 32, 256, 2048])
    parser.add_argument("--adapters", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 16, 64])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--layers", type=int, default=32, help="of the model whose steps are timed")
    parser.add_argument("--contexts", nargs="+", type=int, default=[1000, 4000], help="of the decode steps")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32, 64], help="of the decode steps")
    parser.add_argument("--step-ranks", nargs="+", type=int, default=[16, 64], help="of the decode steps")
    parser.add_argument("--prompts", nargs="+", type=int, default=[512, 2048, 8192], help="tokens")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after them no row begins")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each row")
    parser.add_argument("--tune", type=Path, metavar="FILE")
    parser.add_argument("--compile", nargs="+", type=int, metavar="CAPABILITY", help="80 is 8.0, 90 is 9.0")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print row by row. Returns the exit code."""
    args = parser().parse_args(argv)
    deadline = time.monotonic() + args.seconds
    if args.compile:
        return show([compiled(args.compile)], deadline, as_json=args.json)
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was checked or measured; --compile works without one", file=sys.stderr)
        return 2
    machine = Machine.here(SHAPES[args.shapes])
    if args.tune:
        table = {
            "device": machine.name,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "configs": tune(args, machine),
        }
        args.tune.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {args.tune}; serve with AIOENGINE_TRITON_TABLE={args.tune}")
        return 0
    sheets = (sheet for part in PARTS if part in args.parts for sheet in PARTS[part](args, machine))
    return show(sheets, deadline, as_json=args.json)


def show(sheets: Iterable[Sheet], deadline: float, *, as_json: bool) -> int:
    """Print the sheets while they are measured. Returns 1 if anything failed."""
    failed = 0

    def entries() -> Iterator[dict[str, object]]:
        nonlocal failed
        for entry in measured(sheets, deadline):
            failed |= "error" in entry
            yield entry

    lines = (json.dumps(entry) for entry in entries()) if as_json else markdown(entries())
    for line in lines:
        print(line, flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
