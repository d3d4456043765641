"""Bytes that each rank reads of an adapter's file, and how long that takes, by number of ranks and mode.

    python -m benchmarks.adapters.shard_reads [--rank 16] [--rounds 5]

A random adapter on all seven linears of Llama-3.1-8B, in bfloat16; no model is needed. Bytes are those
that the reading thread got from the system (Linux counts them). The ranks read one after the other, from the
page cache; the median of the slowest rank is printed. The engine's digest is another read.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from threading import Event

import torch

from aioengine.adapters.peft.digest import content_digest
from aioengine.adapters.store import AdapterStore
from aioengine.lab.calibration.random_adapters import write_random_adapter
from aioengine.model.parallel.group import Shard
from aioengine.model.spec import LORA_MODULES
from benchmarks.engine.parallel import LLAMA_8B


def no_weights(layer: int, module: str) -> tuple[torch.Tensor, None]:
    raise AssertionError("this adapter needs none of the base model's weights")


def bytes_read() -> int:
    """Return the bytes that this thread has read so far."""
    with open("/proc/thread-self/io", "rb") as file:
        return int(file.readline().split()[1])


def measure(path: Path, shard: Shard, max_rank: int, rounds: int) -> tuple[int, float]:
    """Return bytes and seconds."""
    store = AdapterStore(
        LLAMA_8B,
        max_rank=max_rank,
        target_modules=LORA_MODULES,
        dtype=torch.bfloat16,
        weights=no_weights,
        shard=shard,
    )
    seconds = []
    for _ in range(rounds + 1):  # the first brings the file to the page cache
        before, began = bytes_read(), time.perf_counter()
        store.finish(store.begin(path.name, str(path)))
        seconds.append(time.perf_counter() - began)
        nbytes = bytes_read() - before
    return nbytes, statistics.median(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = write_random_adapter(Path(folder) / "a", LLAMA_8B, args.rank, seed=0)
        size = sum(file.stat().st_size for file in path.iterdir())
        print(f"Llama-3.1-8B, rank {args.rank}: {size / 1e6:.1f} MB in the adapter's folder")
        print(f"{'ranks':>5}  {'mode':14}{'MB by a rank':>14}{'of the file':>13}{'slowest rank':>14}")
        for count, full in ((1, False), *((n, full) for n in (2, 4, 8) for full in (False, True))):
            found = [measure(path, Shard(r, count, full), args.rank, args.rounds) for r in range(count)]
            nbytes, seconds = max(n for n, _ in found), max(s for _, s in found)
            mode = "" if count == 1 else "fully sharded" if full else "half"
            print(f"{count:5}  {mode:14}{nbytes / 1e6:14.1f}{nbytes / size:13.0%}{seconds * 1e3:11.1f} ms")
        seconds = []
        for _ in range(args.rounds + 1):
            began = time.perf_counter()
            content_digest("a", str(path), Event())
            seconds.append(time.perf_counter() - began)
        print(f"the engine's digest: {statistics.median(seconds[1:]) * 1e3:.1f} ms")


if __name__ == "__main__":
    main()
