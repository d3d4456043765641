"""Mixes of adapters and scaled ones, against PEFT's ``add_weighted_adapter(combination_type="cat")``."""

from __future__ import annotations

import asyncio
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.engine_fixtures import MakeEngine, Tiny, check_tokens, greedy, prompt_of, register
from support.failure_harness import until
from support.mixed_adapters import added_model, generated
from support.process_harness import NothingLeft
from support.selection import mostly_slow
from support.tiny_models import build_adapter

from aioengine import AsyncEngine, RequestOutput
from aioengine.errors import (
    AdapterInvalid,
    AdapterNotFound,
    AdapterTooLarge,
    EngineOverloaded,
    RequestInvalid,
)
from aioengine.request import Wanted

PROMPT = prompt_of(0, 9)
MIXES = [{"rank-3": 0.7, "qv-only": 0.4}, {"rank-3": 0.5}, {"rank-3": -1.0, "rank-4": 1.5}]


async def check(engine: AsyncEngine, tiny: Tiny, *wanted: Wanted) -> list[RequestOutput]:
    return await check_tokens(engine, tiny, [(PROMPT, adapter) for adapter in wanted], 8)


async def test_as_peft_adds_them_up(tiny: Tiny, make_engine: MakeEngine) -> None:
    async with make_engine(tiny) as engine:
        register(engine, tiny, "rank-3", "qv-only", "rank-4")
        *mixed, alone = await check(engine, tiny, *MIXES, "rank-3")
        for mix, output in zip(MIXES, mixed, strict=True):
            added = added_model(tiny.model, {tiny.adapters[name]: weight for name, weight in mix.items()})
            assert output.token_ids == generated(added, PROMPT, 8), mix
        one = await engine.complete(PROMPT, greedy(8), adapter={"rank-3": 1.0})
        assert (one.adapter, one.token_ids) == ("rank-3", alone.token_ids)
        assert [info.name for info in engine.adapters()] == ["rank-3", "qv-only", "rank-4"]
        async for out in engine.generate(PROMPT, greedy(8), adapter=MIXES[0]):
            streamed = out
        assert (streamed.token_ids, streamed.adapter) == (
            mixed[0].token_ids,
            "qv-only@1*0.4+rank-3@1*0.7",
        )
        engine.check_invariants()


async def test_a_mix_is_made_of_its_parts_in_the_cpu_cache(
    tiny: Tiny, make_engine: MakeEngine, tmp_path: Path
) -> None:
    """Their files are gone. Of ranks that together are more than a slot has, in two slots; computed with
    others in one batch."""
    mix = {"all-modules": 0.7, "rank-3": -0.4}
    async with make_engine(tiny, max_loras=4, max_cpu_loras=6) as engine:
        for name in mix:
            folder = shutil.copytree(tiny.adapters[name], tmp_path / name)
            engine.register_adapter(name, folder)
            await engine.complete(PROMPT, greedy(1), adapter=name)
            shutil.rmtree(folder)
        await check(engine, tiny, mix, None, "rank-3", {"rank-3": 0.5}, "all-modules", {"rank-3": -0.25})
        assert len(engine.resident()) == 3, "a scale needs no load and no slot"
        engine.check_invariants()


async def test_by_transformers_own_modules(tiny: Tiny, make_engine: MakeEngine) -> None:
    async with make_engine(tiny, model_impl="transformers") as engine:
        register(engine, tiny, "rank-3", "qv-only", "rank-4")
        await check(engine, tiny, *MIXES)


async def test_a_new_version_and_an_unload(tiny: Tiny, make_engine: MakeEngine) -> None:
    async with make_engine(tiny, max_loras=1, max_cpu_loras=1) as engine:
        await engine.load_adapter("x", tiny.adapters["rank-3"])
        before = await engine.complete(PROMPT, greedy(8), adapter={"x": 0.5})
        await engine.load_adapter("x", tiny.adapters["qv-only"], replace=True)
        after = await engine.complete(PROMPT, greedy(8), adapter={"x": 0.5})
        assert before.token_ids == tiny.expected(PROMPT, 8, {"rank-3": 0.5})
        assert after.token_ids == tiny.expected(PROMPT, 8, {"qv-only": 0.5})
        stream = engine.generate(PROMPT, greedy(30), adapter={"x": 0.5})
        await anext(stream)
        await asyncio.wait_for(engine.unload_adapter("x"), 60)
        with pytest.raises(AdapterNotFound):
            await engine.complete(PROMPT, greedy(1), adapter={"x": 0.5})
        async for out in stream:
            last = out
        assert last.finish_reason == "length"
        await engine.complete(PROMPT, greedy(1))
        assert engine.resident() == []
        engine.check_invariants()


async def test_ranks_add_up_beyond_that_of_a_slot(tiny: Tiny, make_engine: MakeEngine) -> None:
    """As far as there are slots, and no further."""
    mix = {"all-modules": 0.5, "rank-3": 0.25, "rank-4": -0.75}
    async with make_engine(tiny, max_lora_rank=16, max_loras=2, max_cpu_loras=2) as engine:
        register(engine, tiny, *mix)
        for _ in range(2):
            await check(engine, tiny, mix)
            await engine.complete(PROMPT, greedy(1), adapter="rank-3")
        engine.check_invariants()
    async with make_engine(tiny, max_lora_rank=16, max_loras=1, max_cpu_loras=4) as engine:
        register(engine, tiny, *mix)
        with pytest.raises(AdapterTooLarge, match=r"bytes in the slots, which have [\d,]+ in all"):
            await engine.complete(PROMPT, greedy(1), adapter={"all-modules": 0.5, "rank-3": 0.25})


async def test_who_has_too_many_mixes_is_in_nobodys_way(
    tiny: Tiny, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aioengine.runtime.sources.mixes.MAX_MIXES", 4)
    monkeypatch.setattr("aioengine.runtime.sources.mixes.MAX_KEPT", 10)
    async with make_engine(tiny, max_num_seqs=4) as engine:
        register(engine, tiny, "rank-3", "rank-4")

        def mix(weight: float) -> dict[str, float]:
            return {"rank-3": weight, "rank-4": 0.5}

        hogs = [
            asyncio.create_task(engine.complete(PROMPT, greedy(4), adapter=mix(2 + 0.01 * i), tenant=who))
            for number, who in enumerate(("hog", "hog 2", "hog 3", "hog 4"))
            for i in range(6 * number, 6 * number + 6)
        ]
        await until(lambda: engine.stats().waiting >= 10)
        with pytest.raises(EngineOverloaded, match="tenant 'hog' has 4 mixes"):
            await engine.complete(PROMPT, greedy(1), adapter=mix(0.1), tenant="hog")
        output = await engine.complete(PROMPT, greedy(8), adapter=mix(0.25), tenant="b")
        assert output.token_ids == tiny.expected(PROMPT, 8, mix(0.25))
        results = await asyncio.gather(*hogs, return_exceptions=True)
        assert sum(isinstance(found, EngineOverloaded) for found in results) == 4 * 2
        for i in range(12):
            await engine.complete(PROMPT, greedy(1), adapter=mix(0.5 + 0.01 * i), tenant=f"t{i}")
        assert len(engine._core.residency.current) <= 10 + 2
        engine.check_invariants()


async def test_refused(kinds: Tiny, make_engine: MakeEngine) -> None:
    async with make_engine(kinds) as engine:
        register(engine, kinds, "dora", "rank-3")
        wrong: list[tuple[Any, type[Exception], str]] = [
            ({}, RequestInvalid, "a mix of 0 adapters"),
            ({f"a{i}": 1.0 for i in range(9)}, RequestInvalid, "a mix of 9 adapters"),
            ({"rank-3": float("nan")}, RequestInvalid, r"adapter\['rank-3'\]"),
            ({"rank-3": "1"}, RequestInvalid, r"adapter\['rank-3'\]"),
            ({"": 1.0}, RequestInvalid, "adapter"),
            ({"rank-3": 0.5, "nobody": 0.5}, AdapterNotFound, "nobody"),
            ({"dora": 0.5, "rank-3": 0.5}, AdapterInvalid, "'dora' has DoRA's .* scaled but not mixed"),
        ]
        for mix, kind, words in wrong:
            with pytest.raises(kind, match=words):
                await engine.complete(PROMPT, greedy(1), adapter=mix)
        await check(engine, kinds, "rank-3")
        engine.check_invariants()


KINDS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True},
    "rslora": {"use_rslora": True, "r": 5},
    "rank-3-dora": {"use_dora": True, "r": 3, "lora_alpha": 5},
}


@pytest.fixture(scope="session")
def kinds(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    root = tmp_path_factory.mktemp("kinds")
    made = {
        name: build_adapter(tiny.model, root / name, seed=seed, **config)
        for seed, (name, config) in enumerate(KINDS.items())
    }
    biased = load_file(made["bias"] / "adapter_model.safetensors")
    for number, (key, tensor) in enumerate(biased.items()):
        if key.endswith("lora_B.bias"):
            biased[key] = 0.2 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number))
    save_file(biased, made["bias"] / "adapter_model.safetensors", metadata={"format": "pt"})
    return tiny._replace(adapters={**tiny.adapters, **made})


@pytest.mark.parametrize("weight", [0.5, -1.5, 0.0])
@pytest.mark.slow
async def test_a_scale_is_peft_s_own(kinds: Tiny, make_engine: MakeEngine, weight: float) -> None:
    async with make_engine(kinds) as engine:
        register(engine, kinds, *KINDS)
        await check(engine, kinds, *({name: weight} for name in KINDS), "dora")
        engine.check_invariants()


async def test_biases_are_added_up(kinds: Tiny, make_engine: MakeEngine) -> None:
    async with make_engine(kinds) as engine:
        register(engine, kinds, "bias", "rank-3")
        await check(engine, kinds, {"bias": -0.6, "rank-3": 0.8})


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX")
@pytest.mark.usefixtures("preloaded_workers")
@pytest.mark.parametrize("fully", mostly_slow([False, True], True), ids=["half sharded", "fully sharded"])
@pytest.mark.slow
async def test_mixes_on_two_ranks(
    kinds: Tiny, make_engine: MakeEngine, nothing_left: NothingLeft, fully: bool
) -> None:
    """Ranks that two does not divide, too."""
    async with make_engine(
        kinds, executor="process", tensor_parallel_size=2, fully_sharded_loras=fully
    ) as engine:
        register(engine, kinds, "rank-3", "qv-only", "rank-4", *KINDS)
        for mix in (*MIXES, {"rank-3": 0.5, "rslora": 0.25, "bias": 0.6}, {"dora": -0.7}):
            await check(engine, kinds, mix)
        engine.check_invariants()
    await nothing_left.check()


async def test_a_name_with_a_version(tiny: Tiny, make_engine: MakeEngine) -> None:
    async with make_engine(tiny) as engine:
        engine.register_adapter("x", tiny.adapters["rank-3"])
        for name in ("x@1", {"x": 1.0}):
            output = await engine.complete(PROMPT, greedy(8), adapter=name)
            assert (output.adapter, output.token_ids) == ("x", tiny.expected(PROMPT, 8, "rank-3"))
        await engine.load_adapter("x", tiny.adapters["qv-only"], replace=True)
        output = await engine.complete(PROMPT, greedy(8), adapter="x@2")
        assert output.token_ids == tiny.expected(PROMPT, 8, "qv-only")
        half = await engine.complete(PROMPT, greedy(8), adapter={"x": 0.25, "x@2": 0.25})
        assert half.token_ids == tiny.expected(PROMPT, 8, {"qv-only": 0.5})
        for gone in ("x@1", "x@3", "y@1", "x@"):
            with pytest.raises(AdapterNotFound):
                await engine.complete(PROMPT, greedy(1), adapter=gone)


async def test_two_versions_of_one_adapter_are_in_the_order_of_their_content(
    tiny: Tiny, make_engine: MakeEngine
) -> None:
    """However an engine counts them: so a sum has one digest on all engines of a fleet."""
    found: list[tuple[str, list[int]]] = []
    for names in (("rank-3", "qv-only"), ("qv-only", "rank-3")):
        async with make_engine(tiny, max_loras=4, max_cpu_loras=6) as engine:
            await engine.load_adapter("b", tiny.adapters["rank-4"])
            await engine.load_adapter("a", tiny.adapters[names[0]])
            await engine.prepare_adapter("a", tiny.adapters[names[1]])
            needs = engine.generate([4, 5], greedy(60), adapter="a")
            await anext(needs)
            engine.commit_adapter("a")
            called = dict(zip(names, ("a@1", "a"), strict=True))
            mix = {called["rank-3"]: 0.5, called["qv-only"]: 0.25, "b": 0.75}
            output = await engine.complete([4, 5, 6], greedy(6), adapter=mix)
            found.append((output.adapter_digest, output.token_ids))
            await needs.aclose()
    assert found[0] == found[1] and len(found[0][0]) == 64
