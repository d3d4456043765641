"""Cost of more adapters than slots, on a live engine.

    python -m benchmarks.engine.swapping cliff     TTFT and throughput with 4 .. 64 adapters over 8 slots
    python -m benchmarks.engine.swapping gaps      token gaps: 64 adapters over 8 slots, and all 64 in slots
    python -m benchmarks.engine.swapping cold      token gaps while a 150 MB adapter is read from a cold disk
    python -m benchmarks.engine.swapping share --slots 16 --cpu 256 --counts 256
                                                   throughput with 256 adapters over 16 slots, and without

``share`` sends all requests at once, in turns with and without adapters. Elsewhere they arrive by a Poisson
process at 60% of the rate that the engine can take with as many adapters as slots, measured first. They have
128 random prompt tokens and 32 output tokens. Adapters are random, of rank 16, on all seven linears; "zipf"
gives the k-th a weight of 1/k.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import median

from rich.table import Table

from aioengine import AsyncEngine, EngineConfig, LoRAConfig
from aioengine.lab.calibration.random_adapters import write_random_adapter
from aioengine.model.files.resolve import read_spec, resolve_model
from benchmarks.engine.openloop import Arrival, Measured, poisson, replay
from benchmarks.shared.engines import write_adapters
from benchmarks.shared.report import arguments, console, new_table, percentile

MODEL = "smollm2-135m"
PROMPT_TOKENS, OUTPUT_TOKENS = 128, 32
WARM_UP = 5.0
COLUMNS = ("requests", "TTFT median", "p99", "gap median", "p99", "output tok/s", "slot loads", "reads")


def configuration(slots: int, cpu: int, *, rank: int = 16) -> EngineConfig:
    return EngineConfig(
        model=MODEL,
        dtype="bfloat16",
        max_model_len=256,
        max_num_seqs=32,
        kv_cache_memory="1GiB",
        enable_prefix_caching=False,
        lora=LoRAConfig(max_loras=slots, max_cpu_loras=cpu, max_lora_rank=rank),
    )


async def capacity(
    engine: AsyncEngine, names: list[str | None], requests: int = 64, *, zipf: float = 0.0
) -> float:
    """Measure requests per second when all come at once."""
    arrivals = poisson(1e6, 1e-6 * 2 * requests, names, prompt_tokens=PROMPT_TOKENS, zipf=zipf)[:requests]
    await replay(engine, arrivals[:8], output_tokens=2)
    start = time.perf_counter()
    await replay(engine, arrivals, output_tokens=OUTPUT_TOKENS)
    return requests / (time.perf_counter() - start)


async def measure(
    config: EngineConfig,
    adapters: dict[str, Path],
    rate: float,
    seconds: float,
    zipf: float,
) -> Measured:
    names = list(adapters)
    arrivals = poisson(rate, seconds + WARM_UP, names, prompt_tokens=PROMPT_TOKENS, zipf=zipf)
    async with AsyncEngine(config) as engine:
        for name, path in adapters.items():
            engine.register_adapter(name, path)
        return await replay(engine, arrivals, output_tokens=OUTPUT_TOKENS, warm_up=WARM_UP)


async def rate_for(config: EngineConfig, adapters: dict[str, Path], share: float) -> float:
    async with AsyncEngine(config) as engine:
        for name, path in adapters.items():
            await engine.load_adapter(name, path)
        most = await capacity(engine, list(adapters))
    print(f"{most:.2f} requests a second at most with {len(adapters)} adapters; sent are {share * most:.2f}")
    return share * most


async def cliff(args: argparse.Namespace, adapters: dict[str, Path]) -> Table:
    title = f"adapters over {args.slots} slots, {args.cpu} in the CPU cache"
    table = new_table(title, "adapters", "weights", *COLUMNS, texts=0)
    config = configuration(args.slots, args.cpu)
    rate = await rate_for(config, first(adapters, args.slots), args.load)
    for zipf in (0.0, 1.0):
        for count in args.counts:
            found = await measure(config, first(adapters, count), rate, args.seconds, zipf)
            print(
                f"{count} adapters, {'zipf' if zipf else 'uniform'}: TTFT {median(found.ttft):.3f} s, median"
            )
            table.add_row(str(count), "zipf" if zipf else "uniform", *figures(found))
    return table


async def gaps(args: argparse.Namespace, adapters: dict[str, Path]) -> Table:
    """Compare two configurations in turns on the same arrivals, so that a drift of speed affects both."""
    few, all_resident = configuration(args.slots, args.cpu), configuration(64, 64)
    rate = await rate_for(few, first(adapters, args.slots), args.load)
    table = new_table("64 adapters, uniform", "slots", "round", *COLUMNS, texts=0)
    shares = []
    for turn in range(args.rounds):
        pair = []
        for slots, config in ((args.slots, few), (64, all_resident)):
            found = await measure(config, adapters, rate, args.seconds, 0.0)
            pair.append(percentile(found.gaps, 0.99))
            table.add_row(str(slots), str(turn + 1), *figures(found))
            late = percentile(found.late, 0.99) * 1e3
            print(f"{slots} slots: a 5 ms ticker on the event loop is late by {late:.1f} ms at p99")
        shares.append(pair[0] / pair[1])
    print(
        f"p99 gap with {args.slots} slots over p99 with all resident: {', '.join(f'{s:.2f}' for s in shares)}"
    )
    return table


async def share(args: argparse.Namespace, adapters: dict[str, Path]) -> Table:
    """Compare the throughput with all adapters to that without, in turns."""
    table = new_table(
        f"{args.requests} requests at once; {len(adapters)} adapters over {args.slots} slots, zipf",
        *("round", "without, tok/s", "with, tok/s", "share", "slot loads", "reads"),
        texts=0,
    )
    shares = []
    async with AsyncEngine(configuration(args.slots, args.cpu)) as engine:
        for name, path in adapters.items():
            engine.register_adapter(name, path)
        await capacity(engine, list(adapters), args.requests, zipf=1.0)
        for turn in range(args.rounds):
            base = OUTPUT_TOKENS * await capacity(engine, [None], args.requests)
            before = engine.stats()
            adapted = OUTPUT_TOKENS * await capacity(engine, list(adapters), args.requests, zipf=1.0)
            after = engine.stats()
            shares.append(adapted / base)
            loads, reads = after.slot_loads - before.slot_loads, after.cpu_loads - before.cpu_loads
            table.add_row(
                *(str(turn + 1), f"{base:.1f}", f"{adapted:.1f}", f"{shares[-1]:.0%}", str(loads), str(reads))
            )
    print(f"median share: {median(shares):.1%}")
    return table


async def cold(args: argparse.Namespace, folder: Path) -> Table:
    """Measure eight streams of the base model, with and without large adapters being read meanwhile."""
    spec = read_spec(resolve_model(MODEL))
    paths = []
    for i in range(args.rounds):
        paths.append(write_random_adapter(folder / f"big-{i}", spec, 128, seed=i, dtype="float32"))
    megabytes = (paths[0] / "adapter_model.safetensors").stat().st_size / 1e6
    title = f"base-model streams while adapters of {megabytes:.0f} MB are read"
    table = new_table(title, "reads", *COLUMNS, texts=0)
    config = configuration(1, 8, rank=128)
    arrivals = [Arrival(0.0, list(range(100, 228)), None)] * 8
    async with AsyncEngine(config) as engine:
        await replay(engine, arrivals, output_tokens=2)
        for with_reads in (False, True) * 2:
            stream = asyncio.create_task(replay(engine, arrivals, output_tokens=100))
            await asyncio.sleep(0.5)
            took = []
            if with_reads:
                for i, path in enumerate(paths):
                    drop_from_page_cache(path.iterdir())
                    start = time.perf_counter()
                    await engine.load_adapter(f"big-{i}", path)
                    took.append(time.perf_counter() - start)
            found = await stream
            what = "yes: " + ", ".join(f"{s:.2f} s" for s in took) if with_reads else "no"
            table.add_row(what, *figures(found))
            for i in range(len(took)):
                await engine.unload_adapter(f"big-{i}")
    return table


def drop_from_page_cache(files: Iterable[Path]) -> None:
    """Ask the kernel to forget the files' clean pages (it may refuse silently)."""
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def first(adapters: dict[str, Path], count: int) -> dict[str, Path]:
    return dict(list(adapters.items())[:count])


def figures(found: Measured) -> tuple[str, ...]:
    def ms(seconds: float) -> str:
        return f"{seconds * 1e3:.0f} ms"

    return (
        str(len(found.ttft)),
        ms(median(found.ttft)),
        ms(percentile(found.ttft, 0.99)),
        ms(median(found.gaps)),
        ms(percentile(found.gaps, 0.99)),
        f"{found.tokens / found.seconds:.1f}",
        str(found.loads),
        str(found.reads),
    )


async def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("what", choices=("cliff", "gaps", "cold", "share"))
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--cpu", type=int, default=32, help="max_cpu_loras")
    parser.add_argument("--counts", type=int, nargs="+", default=[4, 8, 9, 12, 16, 32, 64])
    parser.add_argument("--seconds", type=float, default=30, help="of load at each point, after a warm-up")
    parser.add_argument("--load", type=float, default=0.6, help="share of the capacity")
    parser.add_argument("--rounds", type=int, default=3, help="of gaps, cold and share")
    parser.add_argument("--requests", type=int, default=128, help="of share")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.what == "cold":
            table = await cold(args, folder)
        else:
            count = 64 if args.what == "gaps" else max(args.counts)
            adapters = write_adapters(folder, read_spec(resolve_model(MODEL)), count)
            table = await {"cliff": cliff, "gaps": gaps, "share": share}[args.what](args, adapters)
    console(140).print(table)


if __name__ == "__main__":
    asyncio.run(main())
