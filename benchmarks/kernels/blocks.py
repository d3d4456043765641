"""Times products with quantized checkpoints' weights: ``python -m benchmarks.kernels.blocks``.

Prints nanoseconds of processor time for 1,000 weights, by format and rows: medians of rounds in which all
formats take turns, over as many weights as a small model has, so that they come out of memory.
"""

from __future__ import annotations

import statistics
import time

import torch

from aioengine.kernels import Weight
from aioengine.kernels.blocks import BlockWeight
from aioengine.kernels.cpu.blocks import PackedBlocks
from aioengine.kernels.cpu.packed import PackedWeight
from aioengine.model.files.packing import GGUF_PACKINGS, MXFP4, Packing
from benchmarks.shared.report import arguments

GROUP = 128


def weight_of(format: str, n: int, k: int) -> Weight:
    """Make a weight with arbitrary codes, which do not change the time."""
    if format == "bfloat16":
        return PackedWeight.pack(torch.randn(n, k).bfloat16())
    group = MXFP4.group if format == MXFP4.format else GROUP
    packing = Packing(format=format, group=group)
    data = torch.randint(0, 127, (n, packing.row_bytes(k)), dtype=torch.uint8)
    if format in GGUF_PACKINGS:
        return PackedBlocks.pack([BlockWeight(format, data, k, torch.bfloat16)])
    scale = torch.rand(n, packing.groups(k))
    if packing.exponents:
        scale = torch.randint(118, 122, scale.shape, dtype=torch.uint8)
    return PackedBlocks.pack([BlockWeight(format, data, k, torch.bfloat16, scale=scale, group=group)])


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--formats", nargs="+", default=[*GGUF_PACKINGS, "int4", "int8", "fp8", "mxfp4"])
    parser.add_argument("--size", type=int, nargs=2, default=[1536, 2048], help="outputs and inputs")
    parser.add_argument("--count", type=int, default=40, help="weights of that size")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    n, k = args.size
    formats = ["bfloat16", *args.formats]
    weights = {format: [weight_of(format, n, k) for _ in range(args.count)] for format in formats}
    print(f"{'':10}" + "".join(f"{rows:>8} rows" for rows in args.rows))
    taken: dict[tuple[str, int], list[float]] = {}
    for _ in range(args.rounds):
        for rows in args.rows:
            x = torch.randn(rows, k).bfloat16()
            for format in formats:
                began = time.process_time()
                for weight in weights[format]:
                    weight.linear(x, None)
                taken.setdefault((format, rows), []).append(time.process_time() - began)
    for format in formats:
        each = (statistics.median(taken[format, rows]) / (n * k * args.count) for rows in args.rows)
        print(f"{format:10}" + "".join(f"{1e12 * seconds:13.0f}" for seconds in each))


if __name__ == "__main__":
    main()
