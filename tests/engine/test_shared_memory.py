"""One memory for adapters and the KV cache: the tokens of transformers and peft, while everything moves."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from support.engine_fixtures import MakeEngine, Tiny, greedy, prompt_of

from aioengine import AsyncEngine, EngineConfig, LoRAConfig
from aioengine.errors import ConfigError

pytestmark = pytest.mark.usefixtures("preloaded_workers")

TIGHT: dict[str, Any] = {
    "slot_memory": "shared",
    "max_loras": 6,
    "max_cpu_loras": 12,
    "max_model_len": 64,
    "kv_cache_memory": "260KiB",  # 234 KiB are the least: one request and one adapter of the largest rank
    "max_num_seqs": 6,
    "max_num_batched_tokens": 32,
}
EXECUTORS: dict[str, dict[str, Any]] = {
    "thread": {},
    "compiled step": {"block_size": 16},
    "transformers": {"model_impl": "transformers"},
    "process": {"executor": "process"},
    "two ranks": {
        "executor": "process",
        "tensor_parallel_size": 2,
        "fully_sharded_loras": True,
        "kv_cache_memory": "160KiB",
    },
}


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.slow
async def test_tokens_are_those_of_peft_while_blocks_and_adapters_move(
    tiny_of: Callable[[str], Tiny], make_engine: MakeEngine, executor: str
) -> None:
    tiny = tiny_of("qwen2" if executor == "two ranks" else "llama")
    rng = random.Random(7)
    names: list[str | None] = [None, *tiny.adapters]
    counts: Counter[str] = Counter()
    async with make_engine(tiny, **{**TIGHT, **EXECUTORS[executor]}) as engine:
        listening = asyncio.create_task(_count(engine, counts))
        await asyncio.sleep(0)

        async def ask(i: int) -> None:
            name = names[rng.randrange(len(names)) if i % 3 else i // 3 % len(names)]
            prompt = prompt_of(i % 5, 12) + prompt_of(100 + i % 11, 1 + i % 7)  # prefixes to find again
            output = await engine.complete(prompt, greedy(6 + i % 9), adapter=name)
            assert output.token_ids == tiny.expected(prompt, 6 + i % 9, name), f"request {i}, adapter {name}"

        for name, folder in tiny.adapters.items():
            engine.register_adapter(name, folder)
        for first in range(0, 60, 20):
            await asyncio.gather(*(ask(i) for i in range(first, first + 20)))
            engine.check_invariants()
            replaced = f"{list(tiny.adapters)[first // 20]}"
            await engine.load_adapter(replaced, tiny.adapters[replaced], replace=True)
        listening.cancel()
    assert counts["BlocksMoved"] > 0 and counts["AdapterEvicted"] > 0
    assert counts["AdapterPlaced"] > len(tiny.adapters)


async def _count(engine: AsyncEngine, counts: Counter[str]) -> None:
    async for event in engine.events():
        counts[type(event).__name__] += 1


async def test_an_idle_adapter_gives_way_and_comes_back(tiny: Tiny, make_engine: MakeEngine) -> None:
    long = {**TIGHT, "max_num_seqs": 16, "kv_cache_memory": "300KiB"}
    async with make_engine(tiny, **long) as engine:
        await engine.load_adapter("a", tiny.adapters["all-modules"])
        first = await engine.complete(prompt_of(0, 9), greedy(4), adapter="a")
        stats = engine.stats()
        assert 0 < stats.slot_memory_used <= stats.slot_memory < stats.shared_memory <= 300 * 2**10
        kv_bytes = stats.shared_memory - stats.slot_memory
        kv = f'aioengine_lora_slot_bytes{{engine="default",state="kv"}} {kv_bytes}'
        assert kv in engine.metrics.expose()[0].decode()
        assert stats.kv_blocks < 100
        base = [engine.complete(prompt_of(i, 40), greedy(20)) for i in range(6)]
        for i, output in enumerate(await asyncio.gather(*base)):
            assert output.token_ids == tiny.expected(prompt_of(i, 40), 20)
        assert engine.stats().slot_memory_used == 0, "base requests needed its memory"
        again = await engine.complete(prompt_of(0, 9), greedy(4), adapter="a")
        engine.check_invariants()
    assert again.token_ids == first.token_ids == tiny.expected(prompt_of(0, 9), 4, "all-modules")


async def test_too_little_memory_says_how_much_is_needed(tiny: Tiny, make_engine: MakeEngine) -> None:
    too_little = r"one request of max_model_len=64 tokens and one adapter of max_lora_rank=16 need \(234"
    with pytest.raises(ConfigError, match=too_little):
        async with make_engine(tiny, **{**TIGHT, "kv_cache_memory": "230KiB"}):
            pass


def test_what_is_shared_is_not_bytes() -> None:
    assert LoRAConfig(slot_memory="shared").shares_memory
    assert not LoRAConfig(slot_memory="1GiB").shares_memory
    with pytest.raises(ConfigError, match="slot_memory"):
        EngineConfig(model="m", lora=LoRAConfig(slot_memory="sharde"))
