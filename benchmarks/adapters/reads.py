"""Time of adapters from disk to the CPU cache, against safetensors' own `load_file` on the same files.

    python -m benchmarks.adapters.reads [--adapters 64] [--rank 16] [--rounds 5]

Reading an adapter includes the file's bytes, their SHA-256, the check for NaN, the multiplication of B by the
scale, and the layout of a slot. The files are in the page cache. Each is read both ways in turn, and the
medians of the times and of their ratios are printed. `--rest` pauses between reads, as an engine does.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from aioengine.adapters.store import AdapterStore
from aioengine.lab.calibration.random_adapters import write_random_adapter
from aioengine.model.files.resolve import read_spec, resolve_model
from aioengine.model.spec import LORA_MODULES


def measure(paths: list[Path], max_rank: int, rounds: int, rest: float) -> list[tuple[float, float]]:
    """Return the seconds of ``load_file`` and of reading, for each file and round."""
    spec = read_spec(resolve_model("smollm2-135m"))

    def no_weights(layer: int, module: str) -> tuple[torch.Tensor, None]:
        raise AssertionError("these adapters need none of the base model's weights")

    store = AdapterStore(
        spec, max_rank=max_rank, target_modules=LORA_MODULES, dtype=torch.bfloat16, weights=no_weights
    )
    found = []
    for round_ in range(rounds + 1):
        for index, path in enumerate(paths):
            time.sleep(rest)
            start = time.perf_counter()
            tensors = load_file(path / "adapter_model.safetensors")
            middle = time.perf_counter()
            store.put(index, store.read(path.name, str(path)))
            end = time.perf_counter()
            store.drop(index)
            del tensors
            if round_:  # the first brings the files to the page cache
                found.append((middle - start, end - middle))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--max-rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rest", type=float, default=0.0, help="seconds before each pair of reads")
    args = parser.parse_args()
    spec = read_spec(resolve_model("smollm2-135m"))
    with tempfile.TemporaryDirectory() as folder:
        paths = [
            write_random_adapter(Path(folder) / f"a{i}", spec, args.rank, seed=i)
            for i in range(args.adapters)
        ]
        megabytes = sum(file.stat().st_size for file in paths[0].iterdir()) / 1e6
        found = measure(paths, args.max_rank, args.rounds, args.rest)
    plain = statistics.median(seconds for seconds, _ in found)
    ours = statistics.median(seconds for _, seconds in found)
    ratio = statistics.median(a / b for a, b in found)
    print(
        f"{args.adapters} adapters of {megabytes:.1f} MB: load_file {plain * 1e3:.1f} ms "
        f"({megabytes / plain / 1e3:.2f} GB/s), into the CPU cache {ours * 1e3:.1f} ms "
        f"({megabytes / ours / 1e3:.2f} GB/s); speed against load_file {ratio:.0%}"
    )


if __name__ == "__main__":
    main()
