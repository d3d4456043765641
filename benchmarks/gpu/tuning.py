"""Block sizes of the Triton kernels for a GPU."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import triton
import triton.testing
from torch import Tensor

from aioengine.kernels import LoRABatch, LoRAPool, SlotMemory
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
from benchmarks.shared.shapes import SHAPES

Config = TypeVar("Config", ShrinkConfig, ExpandConfig)


def gpu() -> str:
    """Return the device. Ends the program if there is none."""
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: nothing was checked or measured")
    return "cuda"


def seconds(function: Callable[[], object]) -> float:
    """Return the median time on the device, with a cold L2 cache, as in serving."""
    return float(triton.testing.do_bench(function, warmup=20, rep=100, return_mode="median")) / 1e3


class Problem(NamedTuple):
    """One fused linear under a batch."""

    x: Tensor
    y: Tensor
    pool: LoRAPool
    batch: LoRABatch


def problem(
    linear: tuple[int, tuple[int, ...]],
    tokens: int,
    adapters: int,
    rank: int,
    dtype: torch.dtype,
    device: str,
) -> Problem:
    """Return ``tokens`` spread evenly over ``adapters``."""
    n_in, widths = linear
    used, n = min(adapters, tokens), len(widths)
    elements = n * rank * n_in + rank * sum(widths) + 2 * sum(widths)
    memory = torch.randn(used * elements, device=device).to(dtype) / n_in**0.5
    slots = SlotMemory(memory, used, n, rank, aligned=True)
    rows, end = [], n * rank * n_in
    for j, width in enumerate(widths):
        rows.append([j * rank * n_in, rank, end, rank, elements - 2 * sum(widths[j:]), -1])
        end += rank * width
    for slot in range(used):
        slots.table[slot], slots.device_table[slot] = slots.rows(torch.tensor(rows), slot * elements)
    counts = [tokens // used + (i < tokens % used) for i in range(used)]
    batch = LoRABatch(list(range(used)), counts, [rank] * used, device)
    offsets = tuple(sum(widths[:j]) for j in range(n))
    names = tuple(str(j) for j in range(n))
    pool = LoRAPool(slots, names, 0, n_in, tuple(widths), offsets, tuple(widths), offsets)
    x = torch.randn(tokens, n_in, device=device).to(dtype)
    return Problem(x, x.new_zeros(tokens, sum(widths)), pool, batch)


def tune(
    *, write: Path, shapes: str = "llama-8b",
    ranks: tuple[int, ...] = (8, 16, 64), dtype: str = "bfloat16",
) -> Iterator[str]:  # fmt: skip
    """Find block sizes for this GPU, for every rank, width and phase; serve with AIOENGINE_TRITON_TABLE."""
    device, kind, spec = gpu(), getattr(torch, dtype), SHAPES[shapes]
    sizes = spec.q_size, spec.kv_size, spec.kv_size
    linears = (spec.hidden_size, sizes), (spec.intermediate_size, (spec.hidden_size,))  # qkv and down
    found: dict[str, dict[str, int]] = {}
    for linear in linears:
        for rank in ranks:
            for tokens, adapters in ((32, 8), (2048, 4)):  # prompts are summed in the order of decoding
                p = problem(linear, tokens, adapters, rank, kind, device)
                h = lora.lora_shrink(p.x, p.pool, p.batch)
                longest, bits = max(s.stop - s.start for s in p.batch.segments), 8 * kind.itemsize
                key = Key.of("shrink", bits, rank, p.pool.in_features, longest)
                start = in_order(default_shrink(key), key, found)
                run = partial(lora.shrink, p.x, p.pool, p.batch)
                found[str(key)] = descend(start, key, run, seconds)._asdict()
                key = Key.of("expand", bits, rank, p.y.shape[1], longest)
                begin = in_order(default_expand(key), key, found)
                found[str(key)] = descend(
                    begin, key, partial(lora.expand, h, p.pool, p.y, p.batch), seconds
                )._asdict()
    table = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    write.write_text(json.dumps(table | {"configs": found}, indent=1) + "\n", encoding="utf-8")
    yield f"wrote {write}; serve with AIOENGINE_TRITON_TABLE={write}"


def in_order(start: Config, key: Key, found: Mapping[str, Mapping[str, int]]) -> Config:
    """Return ``start`` with what the order of sums depends on as it was found for decoding."""
    decode = found.get(str(key._replace(phase="decode")))
    return start if decode is None else start._replace(**{field: decode[field] for field in ORDER[key.op]})


def descend(
    start: Config, key: Key, run: Callable[[Config], object], timer: Callable[[Callable[[], object]], float]
) -> Config:
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
                took = seconds_of(config)
                if took < 0.99 * least:
                    best, least, improved = config, took, True
    return best


CASES = (tune,)
