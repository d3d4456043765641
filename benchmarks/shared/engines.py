"""Engines to measure: started together, with random adapters and random prompts."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from aioengine import AsyncEngine, EngineConfig, LoRAConfig
from aioengine.adapters.store import AdapterStore
from aioengine.lab.calibration.random_adapters import write_random_adapter
from aioengine.model.files.resolve import read_spec, resolve_model
from aioengine.model.runner import ModelRunner
from aioengine.model.spec import ModelSpec

K = TypeVar("K")
PROMPT, OUTPUT = 128, 64
"""Tokens of the usual work, that of ``aioengine bench``."""


def configuration(model: str, *, slots: int = 0, rank: int = 16, **more: Any) -> EngineConfig:
    """Return a configuration for the usual work. Prompts are computed each time."""
    settings: dict[str, Any] = {
        "dtype": "bfloat16",
        "device": "cpu",
        "max_model_len": PROMPT + OUTPUT,
        "max_num_seqs": 32,
        "kv_cache_memory": "1GiB",
        "enable_prefix_caching": False,
        "lora": LoRAConfig(max_loras=slots, max_lora_rank=rank) if slots else None,
    }
    return EngineConfig(model=model, **{**settings, **more})


@asynccontextmanager
async def started(
    configs: Mapping[K, EngineConfig], adapters: Mapping[str, Path] | None = None
) -> AsyncIterator[dict[K, AsyncEngine]]:
    """Context with an engine for each configuration, all in this process, with ``adapters`` loaded."""
    async with AsyncExitStack() as stack:
        engines: dict[K, AsyncEngine] = {}
        for name, config in configs.items():
            engine = engines[name] = await stack.enter_async_context(AsyncEngine(config))
            for adapter, path in (adapters or {}).items():
                await engine.load_adapter(adapter, path)
        yield engines


def spec_of(model: str) -> ModelSpec:
    """Return the shapes of a model by its name or path."""
    return read_spec(resolve_model(model))


def write_adapters(folder: Path, spec: ModelSpec, count: int, rank: int = 16) -> dict[str, Path]:
    """Write random adapters on all linears; returns their folders by name."""
    return {f"random-{i}": write_random_adapter(folder / str(i), spec, rank, seed=i) for i in range(count)}


def fill_slots(runner: ModelRunner, path: Path) -> None:
    """Write an adapter into every slot of a model that no engine runs."""
    slots = runner.lora_slots
    assert slots is not None
    store = AdapterStore(
        slots.layout,
        dtype=slots.dtype,
        affine_dtype=runner.model.dtype,
        weights=runner.model.base_weight,
    )
    image = store.finish(store.begin("adapter", str(path)))
    for slot in range(slots.max_loras):
        slots.write(slot, image)


@contextmanager
def random_adapters(model: str, count: int, rank: int = 16) -> Iterator[dict[str, Path]]:
    """Context with the folders of random adapters on all linears of a model."""
    with tempfile.TemporaryDirectory() as folder:
        yield write_adapters(Path(folder), spec_of(model), count, rank)
