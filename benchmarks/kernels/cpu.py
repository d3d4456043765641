"""Time of a step on the CPU by phase, and how it grows, as tables of medians.

    python -m benchmarks.kernels.cpu                      # everything, some minutes
    python -m benchmarks.kernels.cpu profile adapters     # these tables only
    python -m benchmarks.kernels.cpu batch --quantization none int8
    python -m benchmarks.kernels.cpu ranks --processor    # on a busy machine

``profile``   a decode step by phase, beside what the machine's memory and arithmetic allow
``adapters``  a decode step with 1 to 32 distinct adapters in the batch; in one place: without the time
              that memory takes
``ranks``     ... with 8 adapters of rank 8 to 256
``context``   ... after 128 to 4,096 tokens
``cache``     ... the same with an int8 KV cache
``batch``     ... of 1 to 64 sequences
``prefill``   prompts of 2,048 tokens
``prompt``    a prompt of 4,096 tokens by phase, beside the same limits
``engine``    the whole engine: the share of time outside of model steps, and its own processor time
``start``     from the start of a process to the first token, and the first request against later ones

The cases of a table take turns, so that a drift of the machine's speed falls on all of them.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable

import torch
from rich.table import Table

from benchmarks.kernels.floors import DECODE, LONG_PROMPT, measure_floors, profile_table
from benchmarks.kernels.whole import engine_table, start_table
from benchmarks.shared.report import arguments, console, cpu_name, new_table
from benchmarks.shared.steps import Steps
from benchmarks.shared.turns import least_processor_seconds, median_seconds

CONTEXT = 160


def growth_table(
    title: str,
    what: str,
    cases: dict[str, Callable[[], object]],
    tokens: dict[str, int],
    args: argparse.Namespace,
) -> Table:
    """Make a table of tokens per second of each case, and its time relative to the first."""
    measure, kind = (least_processor_seconds, "least") if args.processor else (median_seconds, "median")
    table = new_table(title, what, f"ms ({kind})", "tok/s", "time, of the first", texts=0)
    found = measure(cases, args.repeats)
    first = next(iter(found.values()))
    for name, seconds in found.items():
        table.add_row(name, f"{seconds * 1e3:.1f}", f"{tokens[name] / seconds:.0f}", f"{seconds / first:.2f}")
    return table


def adapters_table(args: argparse.Namespace, quantization: str) -> Table:
    def made(lora_dtype: torch.dtype = torch.bfloat16, *, one_place: bool = False) -> Steps:
        return Steps(
            args.model, kv_tokens=32 * 256, slots=32, quantization=quantization, lora_dtype=lora_dtype,
            one_place=one_place,
        )  # fmt: skip

    steps = made()
    cases = {"base": steps.decode(32, CONTEXT)}
    cases |= {str(n): steps.decode(32, CONTEXT, n) for n in (1, 2, 4, 8, 16, 32)}
    cases["32, one place"] = made(one_place=True).decode(32, CONTEXT, 32)
    cases["32, int8"] = made(torch.int8).decode(32, CONTEXT, 32)
    cases["32, int8, one place"] = made(torch.int8, one_place=True).decode(32, CONTEXT, 32)
    title = f"decode, 32 sequences, rank 16, {_weights(quantization)}: by distinct adapters"
    return growth_table(title, "adapters", cases, dict.fromkeys(cases, 32), args)


def ranks_table(args: argparse.Namespace, quantization: str) -> Table:
    cases: dict[str, Callable[[], object]] = {}
    for rank in (8, 16, 32, 64, 128, 256):
        steps = Steps(args.model, kv_tokens=32 * 256, slots=8, rank=rank, quantization=quantization)
        if not cases:
            cases["base"] = steps.decode(32, CONTEXT)
        cases[str(rank)] = steps.decode(32, CONTEXT, 8)
    title = f"decode, 32 sequences, 8 adapters, {_weights(quantization)}: by rank"
    return growth_table(title, "rank", cases, dict.fromkeys(cases, 32), args)


def context_table(args: argparse.Namespace, quantization: str) -> Table:
    steps = Steps(args.model, kv_tokens=32 * 4112, slots=8, quantization=quantization)
    lengths = (128, 256, 512, 1024, 2048, 4096)
    cases: dict[str, Callable[[], object]] = {}
    for n in lengths:
        cases[f"{n:,}"] = steps.decode(32, n)
        cases[f"{n:,}, 8 adapters"] = steps.decode(32, n, 8)
    title = f"decode, 32 sequences, {_weights(quantization)}: by context"
    return growth_table(title, "tokens before", cases, dict.fromkeys(cases, 32), args)


def cache_table(args: argparse.Namespace, quantization: str) -> Table:
    kinds = {name: Steps(args.model, kv_tokens=32 * 4112, quantization=quantization, int8_cache=bool(name))
             for name in ("", ", int8 cache")}  # fmt: skip
    cases = {
        f"{n:,}{name}": steps.decode(32, n) for n in (128, 512, 2048, 4096) for name, steps in kinds.items()
    }
    title = f"decode, 32 sequences, {_weights(quantization)}: by the KV cache"
    return growth_table(title, "tokens before", cases, dict.fromkeys(cases, 32), args)


def batch_table(args: argparse.Namespace, quantization: str) -> Table:
    steps = Steps(args.model, kv_tokens=64 * 256, slots=8, quantization=quantization)
    cases: dict[str, Callable[[], object]] = {}
    tokens = {}
    for n in (1, 8, 32, 64):
        cases[str(n)], cases[f"{n}, adapters"] = steps.decode(n, CONTEXT), steps.decode(n, CONTEXT, min(n, 8))
        tokens |= {str(n): n, f"{n}, adapters": n}
    title = f"decode, up to 8 adapters of rank 16, {_weights(quantization)}: by batch"
    return growth_table(title, "sequences", cases, tokens, args)


def prefill_table(args: argparse.Namespace, quantization: str) -> Table:
    steps = Steps(args.model, kv_tokens=4 * 2048, slots=8, quantization=quantization)
    cases = {
        "1 x 2,048": steps.prefill(1, 2048),
        "1 x 2,048, adapter": steps.prefill(1, 2048, 1),
        "16 x 128": steps.prefill(16, 128),
        "16 x 128, 8 adapters": steps.prefill(16, 128, 8),
    }
    title = f"prefill of 2,048 tokens, rank 16, {_weights(quantization)}"
    return growth_table(title, "prompts", cases, dict.fromkeys(cases, 2048), args)


def _weights(quantization: str) -> str:
    return "bfloat16" if quantization == "none" else quantization


TABLES: dict[str, Callable[[argparse.Namespace, str], Table]] = {
    "adapters": adapters_table,
    "ranks": ranks_table,
    "context": context_table,
    "cache": cache_table,
    "batch": batch_table,
    "prefill": prefill_table,
}


def main() -> None:
    parser = arguments(__doc__)
    known = ["profile", "prompt", *TABLES, "engine", "start"]
    parser.add_argument("tables", nargs="*", choices=[[], *known], default=[])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--quantization", nargs="+", default=["none", "int8"], metavar="Q")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--processor", action="store_true", help="one thread's processor time, for a busy machine"
    )
    args = parser.parse_args()
    if args.processor:
        torch.set_num_threads(1)
    wanted = args.tables or known

    out = console()
    out.print(f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    began = time.perf_counter()
    for name in wanted:
        shape = {"profile": DECODE, "prompt": LONG_PROMPT}.get(name)
        if shape is not None:
            floors = measure_floors()
            out.print(floors.table())
        for quantization in args.quantization:
            if shape is not None:
                out.print(profile_table(args.model, quantization, floors, args.repeats, shape))
            elif name == "engine":
                out.print(asyncio.run(engine_table(args.model, quantization)))
            elif name == "start":
                out.print(asyncio.run(start_table(args.model, quantization)))
            else:
                out.print(TABLES[name](args, quantization))
    out.print(f"{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
