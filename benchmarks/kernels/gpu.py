"""The Triton kernels on a GPU: checked, timed, compared with plain torch; and tuned. Whole decode steps, too.

    python -m benchmarks.kernels.gpu                        check every operation, then time it
    python -m benchmarks.kernels.gpu --ranks 16 64 --adapters 1 8 32 --tokens 32 2048
    python -m benchmarks.kernels.gpu --tune table.json      find block sizes for this GPU; serve with them by
                                                    AIOENGINE_TRITON_TABLE=table.json
    python -m benchmarks.kernels.gpu --layers 32 --contexts 1000 4000 --step-ranks 16 64
                                                    the steps of docs/gpu-predictions.md, and predictions
    python -m benchmarks.kernels.gpu --compile 80 90        registers and shared memory; needs no GPU

Times are medians with a cold L2 cache, as in serving, where a layer's matrices were last read a step ago.
Exits with 1 if a check fails and with 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import triton
import triton.testing
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from aioengine.kernels import Backend, LoRABatch, LoRAPool, SlotMemory, get_backend
from aioengine.kernels.triton import lora
from aioengine.kernels.triton import table as tables
from benchmarks.kernels.gpu_steps import (
    check_layer,
    check_steps,
    layer_table,
    quantized_table,
    step_table,
    wall_seconds,
)

LINEARS = {
    "qkv": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate_up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}
"""Inputs, and outputs of each slice: Llama 3 8B's."""

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Of the largest value."""

Timer = Callable[[Callable[[], object]], float]
"""Seconds that a function takes on the device."""

Config = TypeVar("Config", tables.ShrinkConfig, tables.ExpandConfig)
Item = TypeVar("Item")


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
        """What must be read and written at least: x, the active adapters' A, and h."""
        rows = len(self.pool.modules) * sum(segment.rank for segment in self.batch.segments)
        return self.x.nbytes + self.h_bytes + self.x.element_size() * rows * self.pool.in_features

    @property
    def expand_bytes(self) -> int:
        """h, the active adapters' B, and y twice."""
        size, width = self.x.element_size(), sum(self.pool.widths)
        b = sum(segment.rank for segment in self.batch.segments) * width
        return self.h_bytes + size * (2 * len(self.x) * width + b)


def problem(
    linear: str,
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
    n_in, widths = LINEARS[linear]
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


def check(device: str, ranks: Sequence[int]) -> list[str]:
    """Runs every operation beside the oracle; what differs."""
    oracle, wrong = get_backend(device, "reference"), []
    cases = [
        (linear, tokens, adapters, rank, dtype)
        for dtype in TOLERANCE
        for rank in ranks
        for linear, tokens, adapters in (("qkv", 1, 1), ("gate_up", 33, 5), ("down", 300, 3))
    ]
    for linear, tokens, adapters, rank, dtype in _track(cases, "checking"):
        p = problem(linear, tokens, adapters, rank, dtype, device, base_tokens=3, affine=True)
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
            if not error <= TOLERANCE[dtype]:  # NaN, too
                case = f"{linear}, {tokens} tokens, {adapters} adapters, rank {rank}, {dtype}"
                wrong.append(f"{op} of {case}: off by {error:.2g} of the largest value")
    return wrong


def compare(args: argparse.Namespace, device: str, timer: Timer, bandwidth: float) -> Table:
    """What LoRA costs on top of the base linear."""
    dtype: torch.dtype = getattr(torch, args.dtype)
    copies = f"copies at {bandwidth / 1e9:,.0f} GB/s"
    table = Table(title=f"{device_name(device)}, {args.dtype}, {copies}; times in us")
    for column in (
        *("linear", "tokens", "adapters", "rank", "base", "shrink", "of copy", "expand", "of copy"),
        *("LoRA/base", "plain torch", "host"),
    ):
        table.add_column(column, justify="left" if column == "linear" else "right")
    cases = [
        (linear, tokens, adapters, rank)
        for linear in args.linears
        for tokens in args.tokens
        for adapters in args.adapters
        for rank in args.ranks
        if adapters <= tokens
    ]
    for linear, tokens, adapters, rank in _track(cases, "timing"):
        p = problem(linear, tokens, adapters, rank, dtype, device)
        y = F.linear(p.x, p.weight)
        h = lora.lora_shrink(p.x, p.pool, p.batch)
        base = timer(partial(F.linear, p.x, p.weight))
        shrink = timer(partial(lora.lora_shrink, p.x, p.pool, p.batch))
        expand = timer(partial(lora.lora_expand, h, p.pool, y, p.batch))
        plain = timer(partial(add_lora, get_backend(device, "torch"), p, y))
        host = host_seconds(partial(add_lora, lora, p, y), device)
        table.add_row(
            *(linear, str(tokens), str(adapters), str(rank), f"{base * 1e6:.1f}"),
            *(f"{shrink * 1e6:.1f}", f"{p.shrink_bytes / shrink / bandwidth:.0%}"),
            *(f"{expand * 1e6:.1f}", f"{p.expand_bytes / expand / bandwidth:.0%}"),
            *(f"{(shrink + expand) / base:.0%}", f"{plain * 1e6:.1f}", f"{host * 1e6:.1f}"),
        )
    return table


def add_lora(backend: Backend, p: Problem, y: Tensor) -> None:
    h = backend.lora_shrink(p.x, p.pool, p.batch)
    backend.lora_expand(h, p.pool, y, p.batch)


def tune(args: argparse.Namespace, device: str, timer: Timer) -> dict[str, dict[str, int]]:
    """The best configuration found for every rank, width and phase that is asked for. Prompts are summed in
    the order of decoding, which is tuned first."""
    dtype: torch.dtype = getattr(torch, args.dtype)
    bits, found = 8 * dtype.itemsize, {}
    cases = [
        (linear, rank, tokens, adapters)
        for linear in args.linears
        for rank in args.ranks
        for tokens, adapters in ((32, 8), (2048, 4))
    ]
    for linear, rank, tokens, adapters in _track(cases, "tuning"):
        p = problem(linear, tokens, adapters, rank, dtype, device)
        y = F.linear(p.x, p.weight)
        h = lora.lora_shrink(p.x, p.pool, p.batch)
        longest = max(s.stop - s.start for s in p.batch.segments)
        shrink = partial(lora.shrink, p.x, p.pool, p.batch)
        key = tables.Key.of("shrink", bits, rank, p.pool.in_features, longest)
        found[str(key)] = descend(
            _ordered(tables.default_shrink(key), key, found), key, shrink, timer
        )._asdict()
        expand = partial(lora.expand, h, p.pool, y, p.batch)
        key = tables.Key.of("expand", bits, rank, y.shape[1], longest)
        found[str(key)] = descend(
            _ordered(tables.default_expand(key), key, found), key, expand, timer
        )._asdict()
    return found


def _ordered(start: Config, key: tables.Key, found: Mapping[str, Mapping[str, int]]) -> Config:
    """``start`` with what the order of sums depends on as it was found for decoding."""
    decode = found.get(str(key._replace(phase="decode")))
    return (
        start
        if decode is None
        else start._replace(**{field: decode[field] for field in tables.ORDER[key.op]})
    )


def descend(start: Config, key: tables.Key, run: Callable[[Config], object], timer: Timer) -> Config:
    """Halves and doubles one field after the other as long as that is faster by 1% at least."""
    best, least, improved = start, timer(partial(run, start)), True
    while improved:
        improved = False
        for field in start._fields:
            if key.phase == "prefill" and field in tables.ORDER[key.op]:
                continue
            value = getattr(best, field)
            low = tables.SHORT if field.startswith("block_") else 1
            high = {"num_stages": 6, "num_warps": 8, "split_k": 32}.get(field, 256)
            steps = (value - 1, value + 1) if field == "num_stages" else (value // 2, value * 2)
            for candidate in (step for step in steps if low <= step <= high):
                config = best._replace(**{field: candidate})
                try:
                    seconds = timer(partial(run, config))
                except (triton.OutOfResources, triton.CompilationError):
                    continue
                if seconds < 0.99 * least:
                    best, least, improved = config, seconds, True
    return best


def compiled(capabilities: Sequence[int]) -> Table:
    """What the default configurations take of GPUs of these compute capabilities."""
    from aioengine.kernels.triton import aot

    table = Table(title="compiled ahead of time")
    for column in ("kernel", "compute capability", "registers", "spilled", "shared memory"):
        table.add_column(column, justify="left" if column == "kernel" else "right")
    cases = [(variant, capability) for variant in aot.variants() for capability in capabilities]
    for variant, capability in _track(cases, "compiling"):
        usage = aot.compile_variant(variant, capability)
        table.add_row(
            *(str(variant), str(capability / 10), str(usage.registers)),
            *(f"{usage.spilled_bytes} B", f"{usage.shared_bytes / 1024:.1f} KiB"),
        )
    return table


def gpu_seconds(function: Callable[[], object]) -> float:
    milliseconds = triton.testing.do_bench(function, warmup=20, rep=100, return_mode="median")
    return float(milliseconds) / 1e3


def host_seconds(function: Callable[[], object], device: str) -> float:
    """What the host spends to enqueue it."""
    taken = []
    for _ in range(50):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        function()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def copy_bandwidth(device: str, timer: Timer) -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.empty(256 * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / timer(lambda: target.copy_(source))


def device_name(device: str) -> str:
    return str(torch.cuda.get_device_name(device))


def _track(items: Sequence[Item], what: str) -> Iterator[Item]:
    console = Console(stderr=True)
    yield from track(items, what, console=console, disable=not console.is_terminal)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--linears", nargs="+", choices=LINEARS, default=["qkv", "down"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 32, 256, 2048])
    parser.add_argument("--adapters", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 16, 64])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--layers", type=int, default=8, help="of the model whose decode steps are timed")
    parser.add_argument("--contexts", nargs="+", type=int, default=[1000], help="of the decode steps")
    parser.add_argument("--step-ranks", nargs="+", type=int, default=[16], help="of the decode steps")
    parser.add_argument("--tune", type=Path, metavar="FILE")
    parser.add_argument("--compile", nargs="+", type=int, metavar="CAPABILITY", help="80 is 8.0, 90 is 9.0")
    args = parser.parse_args()
    output = Console(width=None if Console().is_terminal else 140)

    if args.compile:
        output.print(compiled(args.compile))
        return 0
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was checked or measured; --compile works without one", file=sys.stderr)
        return 2
    wrong = check("cuda", args.ranks) + check_layer("cuda", "triton", TOLERANCE) + check_steps("cuda")
    if wrong:
        print("wrong results:", *wrong, sep="\n  ", file=sys.stderr)
        return 1
    print(f"every operation, and every recorded step, agrees with the reference on {device_name('cuda')}")
    if args.tune:
        table = {
            "device": device_name("cuda"),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "configs": tune(args, "cuda", gpu_seconds),
        }
        args.tune.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {args.tune}; serve with AIOENGINE_TRITON_TABLE={args.tune}")
        return 0
    bandwidth, dtype = copy_bandwidth("cuda", gpu_seconds), getattr(torch, args.dtype)
    output.print(compare(args, "cuda", gpu_seconds, bandwidth))
    output.print(layer_table(dtype, "cuda", gpu_seconds, bandwidth))
    name, wall = device_name("cuda"), partial(wall_seconds, device="cuda")
    for context in args.contexts:
        for rank in args.step_ranks:
            sizes = {"layers": args.layers, "context": context, "rank": rank}
            output.print(step_table(dtype, "cuda", wall, name=name, **sizes))
    output.print(quantized_table("cuda", gpu_seconds, name=name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
