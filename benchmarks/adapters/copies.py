"""Adapters from disk into the CPU cache, and from there into slots."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file

from aioengine.adapters.store import AdapterStore
from aioengine.model.slots.image import AdapterImage, build_image
from aioengine.model.slots.layout import SlotLayout
from aioengine.model.slots.pool import LoRASlots
from aioengine.model.spec import LORA_MODULES, ModelSpec
from benchmarks.report import median
from benchmarks.runner import Calls
from benchmarks.shared.engines import write_adapters
from benchmarks.shared.shapes import LLAMA_8B, SMOL


def _store(spec: ModelSpec, max_rank: int, **more: Any) -> AdapterStore:
    def no_weights(layer: int, module: str) -> tuple[torch.Tensor, None]:
        raise AssertionError("these adapters need none of the base model's weights")

    return AdapterStore(
        spec, max_rank=max_rank, target_modules=LORA_MODULES, dtype=torch.bfloat16, weights=no_weights, **more
    )


def reads(
    *, adapters: int = 64, rank: int = 16, max_rank: int = 16, rest: float = 0.0, rounds: int = 5
) -> Iterator[Calls]:
    """Adapters from disk (cached) into the CPU cache, against safetensors' own load_file.

    Reading includes the file's bytes, their SHA-256, the check for NaN, the multiplication of B by the
    scale, and the layout of a slot. ``--rest`` pauses before each read, as an engine does.
    """
    store = _store(SMOL, max_rank)
    with tempfile.TemporaryDirectory() as folder:
        paths = list(write_adapters(Path(folder), SMOL, adapters, rank).values())
        size = (paths[0] / "adapter_model.safetensors").stat().st_size / 1e6

        def timed(into_cache: bool) -> dict[str, float]:
            seconds = []
            for path in paths:
                time.sleep(rest)
                began = time.perf_counter()
                if into_cache:
                    store.put(0, store.read(path.name, str(path)))
                else:
                    load_file(path / "adapter_model.safetensors")
                seconds.append(time.perf_counter() - began)
                if into_cache:
                    store.drop(0)
            return {"GB/s": size / 1e3 / median(seconds), "ms each": 1e3 * median(seconds)}

        calls = {"load_file": partial(timed, False), "into the CPU cache": partial(timed, True)}
        yield Calls(
            f"{adapters} adapters of {size:.1f} MB, rank {rank} in slots of {max_rank}", calls, rounds
        )


def slot_writes(*, slots: int = 4, images: int = 6, rounds: int = 100) -> Iterator[Calls]:
    """Adapters from the CPU cache into slots, against a plain copy of as many bytes by one thread."""
    torch.set_num_threads(1)
    for name, spec, rank, modules in (
        ("SmolLM2-135M, rank 16", SMOL, 16, LORA_MODULES),
        ("SmolLM2-135M, rank 8 in a slot of 16", SMOL, 8, LORA_MODULES),
        ("SmolLM2-135M, rank 16, q and v only", SMOL, 16, ("q_proj", "v_proj")),
        ("Llama 3 8B, rank 16", LLAMA_8B, 16, LORA_MODULES),
    ):
        pool = LoRASlots(spec, slots, 16, LORA_MODULES, torch.bfloat16, torch.device("cpu"))
        made = [_image(pool.layout, rank, modules) for _ in range(images)]
        sources = [image.data.clone() for image in made]
        targets = [torch.zeros_like(sources[0]) for _ in range(slots)]
        turn = 0

        def copy() -> float:
            nonlocal turn
            turn += 1
            targets[turn % slots].copy_(sources[turn % images])  # noqa: B023
            return made[0].nbytes / 1e9  # noqa: B023

        def write() -> float:
            pool.write(turn % slots, made[turn % images])  # noqa: B023
            return made[0].nbytes / 1e9  # noqa: B023

        title = f"{name}, {made[0].nbytes / 1e6:.1f} MB"
        yield Calls(title, {"plain copy": copy, "into a slot": write}, rounds, "GB")


def _image(layout: SlotLayout, rank: int, modules: tuple[str, ...]) -> AdapterImage:
    tensors = {
        (layer, module): (torch.ones(rank, n_in).bfloat16(), torch.ones(n_out, rank).bfloat16())
        for layer in range(layout.spec.num_layers)
        for module in modules
        for n_in, n_out in [layout.spec.linear(module)]
    }
    adapter = SimpleNamespace(rank=rank, digest="", tensors=tensors, in_order=None, shape=None)
    return build_image(layout, adapter, {}, torch.bfloat16)


CASES = (reads, slot_writes)
