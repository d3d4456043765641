"""An engine whose adapters are int8: from disk and from memory, replaced, mixed, and moved between slots."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file
from support.engine_fixtures import MakeEngine, Tiny, greedy, prompt_of

PROMPT = prompt_of(0, 9)


@pytest.mark.parametrize("slot_memory", [None, "256KiB"])
async def test_served_like_adapters_of_the_models_dtype(
    tiny: Tiny, make_engine: MakeEngine, slot_memory: str | None
) -> None:
    names = ["rank-3", "qv-only", "rank-4"]
    found: list[dict[str, list[int]]] = []
    sizes: list[dict[str, int]] = []
    for lora_dtype in ("float32", "int8"):
        async with make_engine(
            tiny, max_loras=2, max_cpu_loras=4, lora_dtype=lora_dtype, slot_memory=slot_memory
        ) as engine:
            infos = {name: await engine.load_adapter(name, tiny.adapters[name]) for name in names}
            sizes.append({name: info.bytes for name, info in infos.items()})
            outputs = {name: await engine.complete(PROMPT, greedy(4), adapter=name) for name in names}
            found.append({name: output.token_ids for name, output in outputs.items()})
            if lora_dtype == "float32":
                continue
            # From memory, with the same digest; then another content under the same name; then a mix.
            folder = tiny.adapters["rank-3"]
            config = json.loads((folder / "adapter_config.json").read_text())
            tensors = load_file(folder / "adapter_model.safetensors")
            await engine.load_adapter("held", tensors=tensors, config=config)
            held = await engine.complete(PROMPT, greedy(4), adapter="held")
            assert held.token_ids == found[1]["rank-3"]
            await engine.load_adapter("held", tiny.adapters["rank-4"], replace=True)
            replaced = await engine.complete(PROMPT, greedy(4), adapter="held")
            assert replaced.token_ids == found[1]["rank-4"]
            mixed = await engine.complete(PROMPT, greedy(4), adapter={"rank-3": 1.0})
            assert mixed.token_ids == found[1]["rank-3"]
    # The first token is no close call in these, the whole text might be.
    assert [tokens[0] for tokens in found[0].values()] == [tokens[0] for tokens in found[1].values()]
    for name in names:
        assert sizes[1][name] < 0.4 * sizes[0][name], "a quarter of float32, and the scales"
