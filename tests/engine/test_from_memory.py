"""Adapters that are given in memory: tensors and configuration, a live PEFT model, the content of files."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.engine_fixtures import MakeEngine, Tiny, greedy, prompt_of
from support.failure_harness import until
from support.process_harness import NothingLeft, worker_pids
from support.tiny_models import ALL_MODULES

from aioengine import AsyncEngine
from aioengine.errors import (
    AdapterInvalid,
    AdapterLoadError,
    AdapterTooLarge,
    ConfigError,
    EngineStopped,
)
from aioengine.runtime import adapters

PROMPT = prompt_of(0, 9)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


async def load(engine: AsyncEngine, name: str, folder: Path, **options: Any) -> Any:
    return await engine.load_adapter(name, tensors=tensors_of(folder), config=config_of(folder), **options)


async def tokens(engine: AsyncEngine, adapter: str) -> list[int]:
    return (await engine.complete(PROMPT, greedy(8), adapter=adapter)).token_ids


@pytest.mark.parametrize("kind", ["rank-3", "patterns", "regex", "some-layers"])
async def test_as_from_its_folder(tiny: Tiny, make_engine: MakeEngine, kind: str) -> None:
    async with make_engine(tiny) as engine:
        info = await load(engine, "x", tiny.adapters[kind])
        assert await tokens(engine, "x") == tiny.expected(PROMPT, 8, kind)
        assert (info.version, info.location, info.path) == (1, "cpu", "memory:1")
        assert len(info.digest) == 64
        engine.check_invariants()


async def test_a_lora_config_and_what_was_given_may_change(tiny: Tiny, make_engine: MakeEngine) -> None:
    folder = tiny.adapters["all-modules"]
    given = tensors_of(folder)
    transposed = {key: tensor.t().contiguous().t() for key, tensor in given.items()}
    config = peft.LoraConfig.from_pretrained(str(folder))
    assert isinstance(config.target_modules, set)
    async with make_engine(tiny) as engine:
        await engine.load_adapter("x", tensors=transposed, config=config)
        for tensor in transposed.values():
            tensor.zero_()
        assert await tokens(engine, "x") == tiny.expected(PROMPT, 8, "all-modules")


async def test_is_read_again_after_it_has_left_the_cache(tiny: Tiny, make_engine: MakeEngine) -> None:
    async with make_engine(tiny, max_loras=1, max_cpu_loras=1) as engine:
        await load(engine, "x", tiny.adapters["rank-3"])
        await load(engine, "y", tiny.adapters["qv-only"])
        engine.register_adapter("z", tiny.adapters["rank-4"])
        for _ in range(2):
            assert await tokens(engine, "x") == tiny.expected(PROMPT, 8, "rank-3")
            assert await tokens(engine, "y") == tiny.expected(PROMPT, 8, "qv-only")
            assert await tokens(engine, "z") == tiny.expected(PROMPT, 8, "rank-4")
        await engine.load_adapter("x", replace=True)
        assert await tokens(engine, "x@2") == tiny.expected(PROMPT, 8, "rank-3")


async def test_of_a_live_model(tiny: Tiny, make_engine: MakeEngine) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float32)
    config = peft.LoraConfig(r=4, target_modules=ALL_MODULES, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    expected = []
    async with make_engine(tiny) as engine:
        for step in range(2):
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_" in name:
                        parameter += 0.15 * torch.randn(parameter.shape)
                ids = torch.tensor([PROMPT])
                mine = model.generate(
                    input_ids=ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=2
                )
            expected.append(mine[0, len(PROMPT) :].tolist())
            info = await engine.load_adapter_state("policy", model)
            assert info.version == step + 1
            output = await engine.complete(PROMPT, greedy(6), adapter="policy")
            assert output.token_ids == expected[step]
        with pytest.raises(AdapterInvalid, match="the model has default"):
            await engine.load_adapter_state("policy", model, adapter_name="other")
        with pytest.raises(AdapterInvalid, match=r"expected a peft\.PeftModel"):
            await engine.load_adapter_state("policy", base)


async def test_held_memory_is_bounded_and_given_back(tiny: Tiny, make_engine: MakeEngine) -> None:
    folder = tiny.adapters["rank-3"]
    size = (folder / "adapter_model.safetensors").stat().st_size
    async with make_engine(tiny, max_held_lora_bytes=2 * size) as engine:
        await load(engine, "x", folder)
        for _ in range(3):  # the old one goes when the new one has come
            await load(engine, "x", folder, replace=True)
            await engine.complete(PROMPT, greedy(1))
        await load(engine, "y", folder)
        with pytest.raises(AdapterLoadError, match=r"'z'.*max_held_lora_bytes has room for"):
            await load(engine, "z", folder)
        await engine.unload_adapter("y")
        broken = config_of(folder) | {"r": 2}
        with pytest.raises(AdapterInvalid):
            await engine.load_adapter("z", tensors=tensors_of(folder), config=broken)
        await engine.complete(PROMPT, greedy(1))
        await load(engine, "z", folder)


async def test_who_waits_for_a_copy_when_the_engine_stops_hears_of_it(
    tiny: Tiny, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold = adapters.hold_tensors
    monkeypatch.setattr(adapters, "hold_tensors", lambda *a, **more: time.sleep(0.2) or hold(*a, **more))
    async with make_engine(tiny) as engine:
        loads = [asyncio.create_task(load(engine, name, tiny.adapters["rank-3"])) for name in "ab"]
        await asyncio.sleep(0.05)
    assert {type(error) for error in await asyncio.gather(*loads, return_exceptions=True)} == {EngineStopped}


async def test_checked_as_files_are(tiny: Tiny, make_engine: MakeEngine) -> None:
    folder = tiny.adapters["rank-3"]
    tensors, config = tensors_of(folder), config_of(folder)
    key = next(iter(tensors))
    bad: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"tensors": tensors}, AdapterInvalid, "give either a path, or tensors and their config"),
        ({"config": config}, AdapterInvalid, "give either a path"),
        ({"tensors": tensors, "config": config, "path": folder}, AdapterInvalid, "give either a path"),
        ({"tensors": [], "config": config}, AdapterInvalid, "expected a dict of PEFT's names"),
        ({"tensors": tensors, "config": 3}, AdapterInvalid, "config=int: expected a peft.LoraConfig"),
        ({"tensors": tensors, "config": {"r": object()}}, AdapterInvalid, "cannot be written as JSON"),
        ({"tensors": tensors | {key: tensors[key].long()}, "config": config}, AdapterInvalid, "int64"),
        ({"tensors": tensors | {key: [1.0]}, "config": config}, AdapterInvalid, "found list under str"),
        ({"tensors": tensors | {key: tensors[key] * float("nan")}, "config": config}, AdapterInvalid, "NaN"),
        ({"tensors": tensors | {key: tensors[key][:1]}, "config": config}, AdapterInvalid, "expected shape"),
        ({"tensors": tensors | {"x": tensors[key]}, "config": config}, AdapterInvalid, "unknown key"),
        ({"tensors": tensors, "config": config | {"r": 32}}, AdapterTooLarge, "max_lora_rank is 16"),
        (
            {"tensors": tensors, "config": config | {"use_qalora": True}},
            AdapterInvalid,
            "use_qalora",
        ),
    ]
    async with make_engine(tiny) as engine:
        for arguments, kind, words in bad:
            with pytest.raises(kind, match=words) as caught:
                await engine.load_adapter("x", **arguments)
            assert type(caught.value) is kind and "'x'" in str(caught.value)
        with pytest.raises(AdapterInvalid, match="a name is"):
            await engine.load_adapter("a b", tensors=tensors, config=config)
        assert engine.adapters() == []
        await load(engine, "x", folder)
        with pytest.raises(AdapterInvalid, match=r"already registered from memory:.*replace=True"):
            await load(engine, "x", folder)
        weights = (folder / "adapter_model.safetensors").read_bytes()
        with pytest.raises(AdapterInvalid, match="truncated"):
            await engine.load_adapter_files("y", json.dumps(config).encode(), weights[:-8])
        info = await engine.load_adapter_files("y", json.dumps(config).encode(), weights)
        assert info.rank == 3
        assert await tokens(engine, "y") == tiny.expected(PROMPT, 8, "rank-3")
        engine.check_invariants()
    async with make_engine(tiny, max_held_lora_bytes="1KiB") as engine:
        with pytest.raises(AdapterLoadError, match="max_held_lora_bytes"):
            await load(engine, "x", folder)
    with pytest.raises(ConfigError, match="max_held_lora_bytes='x'"):
        make_engine(tiny, max_held_lora_bytes="x")


@pytest.mark.usefixtures("faulty")
@pytest.mark.slow
async def test_in_a_process_that_is_started_again(
    tiny: Tiny, make_engine: MakeEngine, nothing_left: NothingLeft
) -> None:
    async with make_engine(tiny, executor="process", restart="on-failure") as engine:
        info = await load(engine, "x", tiny.adapters["all-modules"])
        assert await tokens(engine, "x") == tiny.expected(PROMPT, 8, "all-modules")
        os.kill(min(worker_pids()), signal.SIGKILL)
        await until(lambda: engine.degraded)
        assert await tokens(engine, "x") == tiny.expected(PROMPT, 8, "all-modules")
        assert engine.adapters()[0].digest == info.digest
    await nothing_left.check()
