"""Adapters from disk into the CPU cache, and from there into slots."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from aioengine.adapters.store import AdapterStore
from aioengine.model.slots.layout import SlotLayout
from aioengine.model.slots.pool import LoRASlots
from aioengine.model.spec import LORA_MODULES, ModelSpec
from benchmarks.report import median
from benchmarks.runner import Calls
from benchmarks.shared.engines import write_adapters
from benchmarks.shared.shapes import LLAMA_8B, SMOL


def _store(spec: ModelSpec, max_rank: int) -> AdapterStore:
    def no_weights(layer: int, module: str) -> tuple[torch.Tensor, None]:
        raise AssertionError("these adapters need none of the base model's weights")

    layout = SlotLayout(spec, max_rank, LORA_MODULES)
    return AdapterStore(layout, dtype=torch.bfloat16, weights=no_weights)


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
                    store.images[0] = store.finish(store.begin(path.name, str(path)))
                else:
                    load_file(path / "adapter_model.safetensors")
                seconds.append(time.perf_counter() - began)
                if into_cache:
                    del store.images[0]
            return {"GB/s": size / 1e3 / median(seconds), "ms each": 1e3 * median(seconds)}

        calls = {"load_file": partial(timed, False), "into the CPU cache": partial(timed, True)}
        yield Calls(
            f"{adapters} adapters of {size:.1f} MB, rank {rank} in slots of {max_rank}", calls, rounds
        )


def slot_writes(*, slots: int = 4, images: int = 4, rounds: int = 100) -> Iterator[Calls]:
    """Adapters from the CPU cache into slots, against a plain copy of as many bytes by one thread."""
    torch.set_num_threads(1)
    for name, spec, rank in (
        ("SmolLM2-135M, rank 16", SMOL, 16),
        ("SmolLM2-135M, rank 8 in a slot of 16", SMOL, 8),
        ("Llama 3 8B, rank 16", LLAMA_8B, 16),
    ):
        pool = LoRASlots(spec, slots, 16, LORA_MODULES, torch.bfloat16, torch.device("cpu"))
        with tempfile.TemporaryDirectory() as folder:
            paths = write_adapters(Path(folder), spec, images, rank)
            made = [_store(spec, 16).read(key, str(path)) for key, path in paths.items()]
        targets = [torch.zeros_like(made[0].data) for _ in range(slots)]
        turn = itertools.count()

        def copy() -> float:
            i = next(turn)  # noqa: B023
            targets[i % slots].copy_(made[i % images].data)  # noqa: B023
            return made[0].nbytes / 1e9  # noqa: B023

        def write() -> float:
            i = next(turn)  # noqa: B023
            pool.write(i % slots, made[i % images])  # noqa: B023
            return made[0].nbytes / 1e9  # noqa: B023

        title = f"{name}, {made[0].nbytes / 1e6:.1f} MB"
        yield Calls(title, {"plain copy": copy, "into a slot": write}, rounds, "GB")


CASES = (reads, slot_writes)
