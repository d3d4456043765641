"""Time to write an adapter into a slot, against a plain copy of as many bytes by one thread.

    python -m benchmarks.adapters.slot_writes

Each write and its copy are timed in turn, and their medians are compared. No model is loaded, because the
time of a write depends only on shapes.
"""

from __future__ import annotations

import statistics
import time
from types import SimpleNamespace

import torch

from aioengine.model.slots.image import AdapterImage, build_image
from aioengine.model.slots.layout import SlotLayout
from aioengine.model.slots.pool import LoRASlots
from aioengine.model.spec import LORA_MODULES, ModelSpec, RopeSpec

SLOTS, ADAPTERS = 4, 6


def geometry(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int) -> ModelSpec:
    return ModelSpec(
        family="llama", vocab_size=32000, hidden_size=hidden, num_layers=layers, num_heads=heads,
        num_kv_heads=kv_heads, head_dim=hidden // heads, intermediate_size=intermediate, rms_norm_eps=1e-5,
        max_position=8192, rope=RopeSpec(), tie_embeddings=True,
    )  # fmt: skip


def make_image(layout: SlotLayout, rank: int, modules: tuple[str, ...]) -> AdapterImage:
    tensors = {
        (layer, module): (
            torch.ones(rank, n_in, dtype=torch.bfloat16),
            torch.ones(n_out, rank, dtype=torch.bfloat16),
        )
        for layer in range(layout.spec.num_layers)
        for module in modules
        for n_in, n_out in [layout.spec.linear(module)]
    }
    adapter = SimpleNamespace(rank=rank, digest="", tensors=tensors, in_order=None, shape=None)
    return build_image(layout, adapter, {}, torch.bfloat16)


def measure(spec: ModelSpec, rank: int, modules: tuple[str, ...], repeats: int) -> tuple[int, float, float]:
    """Return the bytes of an adapter, and the median seconds of copying them and of writing it into a
    slot."""
    slots = LoRASlots(spec, SLOTS, 16, LORA_MODULES, torch.bfloat16, torch.device("cpu"))
    images = [make_image(slots.layout, rank, modules) for _ in range(ADAPTERS)]
    sources = [image.data.clone() for image in images]
    targets = [torch.zeros_like(sources[0]) for _ in range(SLOTS)]
    copies: list[float] = []
    writes: list[float] = []
    for i in range(repeats):
        start = time.perf_counter()
        targets[i % SLOTS].copy_(sources[i % ADAPTERS])
        middle = time.perf_counter()
        slots.write(i % SLOTS, images[i % ADAPTERS])
        copies.append(middle - start)
        writes.append(time.perf_counter() - middle)
    return images[0].nbytes, statistics.median(copies), statistics.median(writes)


def main() -> None:
    torch.set_num_threads(1)
    small, large = geometry(576, 30, 9, 3, 1536), geometry(4096, 32, 32, 8, 14336)
    cases = [
        ("SmolLM2-135M, rank 16", small, 16, LORA_MODULES, 200),
        ("SmolLM2-135M, rank 8 in a slot of 16", small, 8, LORA_MODULES, 200),
        ("SmolLM2-135M, rank 16, q and v only", small, 16, ("q_proj", "v_proj"), 200),
        ("Llama-3-8B, rank 16", large, 16, LORA_MODULES, 40),
    ]
    print(f"{'':40}{'MB':>7}{'copy ms':>10}{'write ms':>10}{'of copy speed':>15}")
    for label, spec, rank, modules, repeats in cases:
        nbytes, copy, write = measure(spec, rank, modules, repeats)
        print(f"{label:40}{nbytes / 1e6:7.1f}{copy * 1e3:10.2f}{write * 1e3:10.2f}{copy / write:15.0%}")


if __name__ == "__main__":
    main()
