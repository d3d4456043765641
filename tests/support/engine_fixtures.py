"""Tiny models with adapters, and engines over them."""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.byte_tokenizer import byte_tokenizer
from support.greedy import Greedy
from support.mixed_adapters import generated, scaled_model
from support.tiny_models import ALL_MODULES, build_adapter, build_model, reference_generate

from aioengine import AsyncEngine, EngineConfig, LoRAConfig, RequestOutput, SamplingParams
from aioengine.request import Wanted
from aioengine.schedulers import SchedulerPolicy

ADAPTERS: dict[str, dict[str, Any]] = {
    "all-modules": {"r": 16, "lora_alpha": 16},
    "qv-only": {"r": 8, "target_modules": ["q_proj", "v_proj"]},
    "rank-3": {"r": 3, "lora_alpha": 6},
    "rank-4": {"r": 4, "lora_alpha": 8, "target_modules": ["k_proj", "o_proj", "down_proj"]},
    "rslora": {"r": 9, "lora_alpha": 6, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 11},
        "alpha_pattern": {"v_proj": 3, "layers.0.self_attn.k_proj": 16},
    },
    "regex": {"r": 4, "target_modules": r".*\.(1|2)\..*(q_proj|up_proj)"},
    "all-linear": {"r": 5, "lora_alpha": 10, "target_modules": "all-linear"},
    "some-layers": {"r": 6, "layers_to_transform": [0, 2], "target_modules": ALL_MODULES},
}


class Tiny(NamedTuple):
    """A tiny random model on disk, its adapters by name, and what transformers and peft make of them."""

    model: Path
    adapters: dict[str, Path]

    def expected(self, prompt: list[int], count: int, adapter: Wanted = None) -> Greedy:
        if isinstance(adapter, Mapping):
            weights = {self.adapters[name]: weight for name, weight in adapter.items()}
            return generated(scaled_model(self.model, weights), prompt, count)
        return reference_generate(self.model, prompt, count, adapter and self.adapters[adapter])


@pytest.fixture(scope="session")
def tiny_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    """``tiny_of(family)``: built once a process, for all modules that import this fixture."""
    return functools.partial(_tiny_of, tmp_path_factory.getbasetemp())


@functools.cache
def _tiny_of(base: Path, family: str) -> Tiny:
    model = build_model(base / f"tiny-{family}" / "model", family)
    adapters = {
        name: build_adapter(model, model.parent / name, seed=seed, **config)
        for seed, (name, config) in enumerate(ADAPTERS.items())
    }
    return Tiny(model, adapters)


@pytest.fixture(scope="session")
def tiny(tiny_of: Callable[[str], Tiny]) -> Tiny:
    """A tiny llama without a tokenizer."""
    return tiny_of("llama")


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A tiny llama whose tokenizer has one token for each of the 256 bytes, and a chat template."""
    return _tiny_text(tmp_path_factory.getbasetemp())


@functools.cache
def _tiny_text(base: Path) -> Tiny:
    model = build_model(base / "tiny-text" / "model", "llama", eos_token_id=255)
    byte_tokenizer().save(str(model / "tokenizer.json"))
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    return Tiny(model, {"a": build_adapter(model, model.parent / "a", seed=1)})


MakeEngine = Callable[..., AsyncEngine]


@pytest.fixture
def make_engine() -> MakeEngine:
    """``make_engine(tiny, policy=None, max_loras=2, ..., **engine fields)``: float32, small caches."""

    def make(tiny: Tiny, policy: SchedulerPolicy | None = None, **fields: Any) -> AsyncEngine:
        names = LoRAConfig.__struct_fields__
        lora = {key: fields.pop(key) for key in list(fields) if key in names}
        defaults: dict[str, Any] = {
            "dtype": "float32",
            "max_model_len": 128,
            "block_size": 4,
            "max_num_seqs": 16,
            "kv_cache_memory": "2MiB",
        }
        config = EngineConfig(
            model=str(tiny.model),
            lora=LoRAConfig(**{"max_loras": 2, "max_cpu_loras": 3, **lora}),
            **{**defaults, **fields},
        )
        return AsyncEngine(config, policy)

    return make


async def refused(engine: AsyncEngine, error: type[Exception], said: str) -> None:
    """Check that it does not start, and why. It is stopped in any case: what a failed test left running would
    fail others."""
    try:
        with pytest.raises(error, match=said):
            await engine.start()
    finally:
        await engine.stop()


def register(engine: AsyncEngine, tiny: Tiny, *names: str) -> None:
    """Tell it where these adapters are, or where all are."""
    for name in names or tiny.adapters:
        engine.register_adapter(name, tiny.adapters[name])


async def check_tokens(
    engine: AsyncEngine, tiny: Tiny, asked: Iterable[tuple[list[int], Wanted]], count: int = 24
) -> list[RequestOutput]:
    """Ask for all of these at once: each gets the tokens that transformers and peft give."""
    asked = list(asked)
    outputs = await asyncio.gather(
        *(engine.complete(prompt, greedy(count), adapter=adapter) for prompt, adapter in asked)
    )
    for (prompt, adapter), output in zip(asked, outputs, strict=True):
        assert output.token_ids == tiny.expected(prompt, count, adapter), f"adapter {adapter}"
    return outputs


def prompt_of(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(3, 255), k=length)


def greedy(max_tokens: int = 24) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True)
