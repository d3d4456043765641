"""Time and bytes of a step on one and two ranks, half and fully sharded, and computed bytes for more ranks.

    python -m benchmarks.engine.parallel                    # about a minute on two idle cores
    python -m benchmarks.engine.parallel --kernels torch    # plain torch, instead of the compiled step
    python -m benchmarks.engine.parallel --count            # only the counting

A random model of eight layers in bfloat16. The number of threads in all is the same for any number of ranks.
The ranks are processes on this machine, over gloo. The two ways of sharding take turns, step by step, in the
same processes. Prints medians.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import distributed, multiprocessing

from aioengine.adapters.peft.pack import PackedAdapter
from aioengine.kernels import get_backend
from aioengine.model.files.resolve import read_spec
from aioengine.model.parallel.group import DistributedGroup, Group, Shard, SoloGroup
from aioengine.model.parallel.ranges import take
from aioengine.model.runner import ModelRunner
from aioengine.model.slots.image import build_image
from aioengine.model.slots.layout import SlotLayout
from aioengine.model.spec import LORA_MODULES, ModelSpec, RopeSpec
from aioengine.request import SamplingParams
from aioengine.step import SequenceWork, StepBatch

RANKS = (8, 64, 256)
ADAPTERS = 4
BLOCK = 16
THREADS = 2
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 8192, "hidden_size": 512, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 1536, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip
LLAMA_8B = ModelSpec(
    family="llama", vocab_size=128256, hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8,
    head_dim=128, intermediate_size=14336, rms_norm_eps=1e-5, max_position=131072, rope=RopeSpec(),
    tie_embeddings=False,
)  # fmt: skip


class Load(NamedTuple):
    """A step to time: a number of sequences, each with a number of new tokens after a context."""

    name: str
    sequences: int
    tokens: int
    context: int


LOADS = (
    Load("decode, 1 row", 1, 1, 128),
    Load("decode, 16 rows", 16, 1, 128),
    Load("prefill, 128", 1, 128, 0),
    Load("prefill, 1024", 1, 1024, 0),
)


class Point(NamedTuple):
    load: str
    rank: int
    seconds: float
    nbytes: int
    calls: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kernels", default=None, help="the backend; by default the best for a CPU")
    parser.add_argument("--count", action="store_true", help="measure nothing")
    args = parser.parse_args()
    if not args.count:
        times(get_backend("cpu", args.kernels).name)
    count()


# -- measured ----------------------------------------------------------------------------------


def times(kernels: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        (alone,), (half, full) = measured(folder, 1, kernels), measured(folder, 2, kernels)
    print(f"kernels: {kernels}, {THREADS} threads in all")
    print(f"{'a step':18}{'rank':>6}{'1 rank':>10}{'2, half':>10}{'2, fully':>10}{'fully/half':>12}", end="")
    print(f"{'KB sent, half':>16}{'fully':>8}{'calls':>8}{'fully':>7}")
    for one, a, b in zip(alone, half, full, strict=True):
        print(f"{one.load:18}{one.rank:6}", end="")
        print("".join(f"{point.seconds * 1e3:7.1f} ms" for point in (one, a, b)), end="")
        print(f"{b.seconds / a.seconds:12.2f}{a.nbytes / 1e3:16.0f}{b.nbytes / 1e3:8.0f}", end="")
        print(f"{a.calls:8}{b.calls:7}")
    faster = [f"{b.load} at rank {b.rank}" for a, b in zip(half, full, strict=True) if b.seconds < a.seconds]
    print(f"\nFully sharded was faster here in: {', '.join(faster) or 'no case'}.")
    ratios = {(b.load, b.rank): b.seconds / a.seconds for a, b in zip(half, full, strict=True)}
    for axis, values in ((1, RANKS), (0, [load.name for load in LOADS])):
        means = (
            statistics.geometric_mean(r for case, r in ratios.items() if case[axis] == value)
            for value in values
        )
        shown = ", ".join(f"{mean:.2f} ({value})" for mean, value in zip(means, values, strict=True))
        print(f"Fully sharded / half, geometric means by {('step', 'rank')[axis]}: {shown}.")
    print("gloo on one machine copies through sockets: this says little of GPUs with NVLink.\n")


def write_model(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    spec = read_spec(folder)
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return (0.02 * torch.randn(shape, generator=generator)).to(torch.bfloat16)

    tensors = {
        "model.embed_tokens.weight": randn(spec.vocab_size, spec.hidden_size),
        "model.norm.weight": torch.ones(spec.hidden_size, dtype=torch.bfloat16),
    }
    for layer in range(spec.num_layers):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = torch.ones(spec.hidden_size, dtype=torch.bfloat16)
        for module in LORA_MODULES:
            block = "mlp" if module in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            tensors[f"{prefix}.{block}.{module}.weight"] = randn(*spec.linear(module)[::-1])
    save_file(tensors, folder / "model.safetensors")


def measured(folder: str, size: int, kernels: str) -> list[list[Point]]:
    """Return the times of the first of ``size`` processes: half, and fully sharded if there are several."""
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the engine's workers have it
    with tempfile.TemporaryDirectory() as meeting:
        results = multiprocessing.get_context("spawn").SimpleQueue()
        multiprocessing.spawn(run_rank, (size, folder, kernels, f"{meeting}/store", results), nprocs=size)
        points: list[list[Point]] = results.get()
    return points


def run_rank(
    rank: int,
    size: int,
    folder: str,
    kernels: str,
    store: str,
    results: multiprocessing.SimpleQueue[list[list[Point]]],
) -> None:
    torch.set_num_threads(max(THREADS // size, 1))
    groups: list[Group] = [SoloGroup()]
    if size > 1:
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        distributed.init_process_group(
            "gloo",
            store=distributed.FileStore(store, size),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=60),
        )
        world = distributed.group.WORLD
        assert world is not None
        groups = [DistributedGroup(world, Shard(rank, size, full)) for full in (False, True)]
    points: list[list[Point]] = [[] for _ in groups]
    for lora_rank in RANKS:
        runners = [runner_of(group, Path(folder), kernels, lora_rank) for group in groups]
        for load in LOADS:
            for of_mode, point in zip(points, timed(runners, load, lora_rank), strict=True):
                of_mode.append(point)
    if rank == 0:
        names = [load.name for load in LOADS]
        results.put([sorted(of_mode, key=lambda point: names.index(point.load)) for of_mode in points])
    if size > 1:
        distributed.destroy_process_group()


def runner_of(group: Group, folder: Path, kernels: str, lora_rank: int) -> ModelRunner:
    runner = ModelRunner(
        read_spec(folder),
        folder,
        dtype=torch.bfloat16,
        device="cpu",
        num_blocks=16 * 9 + 64,
        block_size=BLOCK,
        max_loras=ADAPTERS,
        max_lora_rank=lora_rank,
        kernels=kernels,
        group=group,
    )
    slots = runner.lora_slots
    assert slots is not None
    adapter = random_adapter(runner.spec, lora_rank)
    for slot in range(ADAPTERS):
        slots.write(slot, build_image(slots.layout, share_of(adapter, slots.layout), {}, torch.bfloat16))
    return runner


def random_adapter(spec: ModelSpec, rank: int) -> PackedAdapter:
    tensors = {
        (layer, module): (
            (0.02 * torch.randn(rank, n_in)).to(torch.bfloat16),
            (0.02 * torch.randn(n_out, rank)).to(torch.bfloat16),
        )
        for layer in range(spec.num_layers)
        for module in LORA_MODULES
        for n_in, n_out in [spec.linear(module)]
    }
    return PackedAdapter("random", "", rank, "", 0, tensors)


def share_of(adapter: PackedAdapter, layout: SlotLayout) -> PackedAdapter:
    tensors = {}
    for key, (a, b) in adapter.tensors.items():
        share = layout.share(key[1])
        tensors[key] = a[share.a], take(b, share.b)
    return dataclasses.replace(adapter, tensors=tensors)


def timed(runners: Sequence[ModelRunner], load: Load, lora_rank: int) -> list[Point]:
    """Time the same step in each mode, in turns."""
    blocks = -(-(load.context + load.tokens) // BLOCK)
    works = [
        SequenceWork(
            request_id="",
            slot=i * ADAPTERS // load.sequences,
            tokens=list(range(3, 3 + load.tokens)),
            start=load.context,
            block_table=list(range(i * blocks, (i + 1) * blocks)),
            sample=True,
            params=SamplingParams(temperature=0),
            seed=0,
            history=[],
            prompt_len=load.tokens,
        )
        for i in range(load.sequences)
    ]
    batch = StepBatch(0, works, [lora_rank] * ADAPTERS)
    seconds: list[list[float]] = [[] for _ in runners]
    for turn in range(-2, 5 if load.tokens > 256 else 15):
        for runner, of_runner in zip(runners, seconds, strict=True):
            runner.group.traffic.reset()
            start = time.perf_counter()
            runner.execute(batch)
            if turn >= 0:
                of_runner.append(time.perf_counter() - start)
    points = []
    for runner, of_runner in zip(runners, seconds, strict=True):
        sent = runner.group.traffic  # of the last step
        calls = sent.all_reduces + sent.all_gathers
        points.append(Point(load.name, lora_rank, statistics.median(of_runner), sent.nbytes, calls))
    return points


# -- counted -----------------------------------------------------------------------------------


def count() -> None:
    """Compute the formulas of docs/parallel.md, for bfloat16 and adapters on all seven linears."""
    spec, bf16 = LLAMA_8B, 2
    print("Llama-3.1-8B, bfloat16. Sent by each rank for a token; its LoRA work; its bytes of a slot:")
    header = (
        "ranks",
        "rank",
        "base KB",
        "LoRA KB half",
        "fully",
        "LoRA MFLOP half",
        "fully",
        "MB half",
        "fully",
    )
    print("".join(f"{text:>{max(len(text), 5) + 2}}" for text in header))
    for size in (2, 4, 8):
        for rank in RANKS:
            base = base_elements(spec, size) * bf16
            extra = gathered_elements(spec, size, rank) * bf16
            layouts = [SlotLayout(spec, rank, LORA_MODULES, Shard(0, size, full)) for full in (False, True)]
            flops = [2 * layout.matrix_elements for layout in layouts]  # every element once for a token
            held = [layout.elements * bf16 for layout in layouts]
            cells: Sequence[str] = (
                *(str(size), str(rank), f"{base / 1e3:.0f}", "0", f"{extra / 1e3:.1f}"),
                *(f"{value / 1e6:.1f}" for value in flops),
                *(f"{value / 1e6:.1f}" for value in held),
            )
            widths = [max(len(text), 5) + 2 for text in header]
            print("".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))
    saved = (flops[0] - flops[1]) / extra
    print(
        f"\nWork saved and bytes added grow alike with tokens, rank and ranks: {saved:,.0f} FLOP for a byte."
    )
    print("So over a long prompt fully sharded gains where a GPU computes LoRA below")
    for link, speed in (("NVLink", 450e9), ("PCIe 4 x16", 25e9)):
        print(f"  {saved * speed / 1e12:6,.0f} TFLOP/s with {speed / 1e9:.0f} GB/s between ranks ({link})")
    half, full = (SlotLayout(spec, 64, LORA_MODULES, Shard(0, 2, full)) for full in (False, True))
    fewer, calls = (half.elements - full.elements) * bf16, 4 * spec.num_layers
    print(
        f"A decode step spends its time on reading: on 2 ranks at rank 64, {fewer / 1e6:.0f} MB less for "
        f"each adapter in the batch,\n{fewer / 3.35e12 * 1e6:.0f} us at 3.35 TB/s, for {calls} calls more, "
        f"{calls * 10e-6 * 1e3:.2f} ms if a call takes 10 us.\n"
        "By counting, the claim (faster at high sequence length, rank or number of ranks) is right for long "
        "prompts where links\nare fast, and for decoding only with many adapters of high ranks in the batch. "
        "A slot always takes less memory."
    )


def base_elements(spec: ModelSpec, size: int) -> float:
    """Return the elements for each token: the embedding's all-reduce, two in each layer. (Sampled rows also
    send logits.)"""
    return 2 * (size - 1) / size * spec.hidden_size * (1 + 2 * spec.num_layers)


def gathered_elements(spec: ModelSpec, size: int, rank: int) -> float:
    """Return the elements for each token, fully sharded: gathers for q, k, v, gate, up; all-reduces for o,
    down."""
    share = -(-rank // size)
    return spec.num_layers * (5 * (size - 1) * share + 2 * 2 * (size - 1) / size * rank)


if __name__ == "__main__":
    main()
