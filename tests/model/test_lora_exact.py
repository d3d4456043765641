"""LoRA through the slots against peft in float32, token for token, and the pool's size and writes."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import build_adapter, build_model, read_peft, reference_generate

from aioengine.errors import ConfigError
from aioengine.model.hf_config import read_spec
from aioengine.model.lora_slots import LoRASlots
from aioengine.model.spec import LORA_MODULES

MakeDriver = Callable[..., Any]

ADAPTERS: dict[str, tuple[dict[str, Any], float]] = {
    "all": ({}, 2.0),
    "qv-rank-3": ({"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}, 2.0),
    "rank-8": ({"r": 8, "lora_alpha": 8}, 1.0),
    "down-in-one-layer": (
        {"lora_alpha": 24, "target_modules": ["down_proj", "o_proj"], "layers_to_transform": [1]},
        6.0,
    ),
    "gate-rank-1": ({"r": 1, "lora_alpha": 4, "target_modules": ["gate_proj", "k_proj"]}, 4.0),
}
"""PEFT configuration, and its alpha / r."""


def prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(3, 256), k=length)


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Path]]:
    """A model and its adapters, on disk."""
    root = tmp_path_factory.mktemp(request.param)
    model = build_model(root / "model", request.param)
    adapters = {
        name: build_adapter(model, root / name, seed=i, **config)
        for i, (name, (config, _)) in enumerate(ADAPTERS.items())
    }
    return model, adapters


@pytest.mark.parametrize("kernels", ["torch", "reference"])
def test_adapters_and_base_rows_mixed_equal_peft_one_by_one(
    served: tuple[Path, dict[str, Path]], kernels: str, make_driver: MakeDriver
) -> None:
    model, adapters = served
    driver = make_driver(model, max_loras=7, max_lora_rank=16, kernels=kernels)
    slots = {"all": 5, "qv-rank-3": 0, "rank-8": 2, "down-in-one-layer": 3, "gate-rank-1": 6}
    for pool in (p for layer in driver.runner.lora_slots.layers for p in layer.values()):
        for tensor in (pool.a, *pool.b):
            tensor.fill_(float("nan"))  # what a slot held before must not matter
    for name, slot in slots.items():
        driver.load(slot, read_peft(adapters[name], ADAPTERS[name][1]))

    work: list[tuple[str | None, list[int], Any]] = []
    served_by: list[str | None] = [*ADAPTERS, None, "all", None, "rank-8", "all"]
    for i, who in enumerate(served_by):
        tokens = prompt(i, 5 + 6 * i)
        work.append((who, tokens, driver.add(tokens, slots[who] if who else -1)))
    driver.run(*(sequence for *_, sequence in work), new_tokens=24, chunk=20)

    for who, tokens, sequence in work:
        adapter = adapters[who] if who else None
        expected = reference_generate(model, tokens, 24, adapter)
        assert sequence.output == expected, who
        assert adapter is None or expected != reference_generate(model, tokens, 24), who


def test_a_pool_in_another_dtype_than_the_model(
    served: tuple[Path, dict[str, Path]], make_driver: MakeDriver
) -> None:
    model, adapters = served
    packed = read_peft(adapters["all"], 2.0)
    rounded = SimpleNamespace(
        rank=packed.rank,
        tensors={k: (a.bfloat16(), b.bfloat16()) for k, (a, b) in packed.tensors.items()},
    )
    outputs = []
    for lora_dtype in (torch.bfloat16, torch.float32):
        driver = make_driver(model, max_loras=1, max_lora_rank=4, lora_dtype=lora_dtype)
        driver.load(0, rounded)
        sequence = driver.add(prompt(1, 12), 0)
        driver.run(sequence, new_tokens=12)
        outputs.append(sequence.output)
    assert outputs[0] == outputs[1]


def test_an_overwritten_slot_forgets_the_adapter_before(
    served: tuple[Path, dict[str, Path]], make_driver: MakeDriver
) -> None:
    model, adapters = served
    driver = make_driver(model, max_loras=1, max_lora_rank=8)
    driver.load(0, read_peft(adapters["rank-8"], 1.0))
    driver.load(0, read_peft(adapters["qv-rank-3"], 2.0))
    sequence = driver.add(prompt(3, 12), 0)
    driver.run(sequence, new_tokens=12)
    assert sequence.output == reference_generate(model, prompt(3, 12), 12, adapters["qv-rank-3"])


@pytest.mark.parametrize("rank", [1, 16, 64])
@pytest.mark.parametrize("targets", [LORA_MODULES, ("q_proj", "v_proj"), ("up_proj", "o_proj")])
def test_pool_bytes_are_exact(
    served: tuple[Path, dict[str, Path]], rank: int, targets: tuple[str, ...]
) -> None:
    spec = read_spec(served[0])
    slots = LoRASlots(spec, 3, rank, targets, torch.bfloat16, torch.device("cpu"))
    expected = {m: 3 * spec.num_layers * rank * sum(spec.linear(m)) * 2 for m in LORA_MODULES if m in targets}
    assert slots.nbytes_by_module == expected
    allocated = [t for layer in slots.layers for pool in layer.values() for t in (pool.a, *pool.b)]
    assert slots.nbytes == sum(expected.values()) == sum(t.nbytes for t in allocated)


def test_a_write_leaves_other_slots_alone(served: tuple[Path, dict[str, Path]]) -> None:
    model, adapters = served
    slots = LoRASlots(read_spec(model), 3, 8, LORA_MODULES, torch.float32, torch.device("cpu"))
    tensors = [t for layer in slots.layers for pool in layer.values() for t in (pool.a, *pool.b)]
    for tensor in tensors:
        tensor.fill_(7.0)
    slots.write(1, read_peft(adapters["all"], 2.0))
    for tensor in tensors:
        assert (tensor[[0, 2]] == 7.0).all()
        assert not (tensor[1] == 7.0).any()


def test_what_does_not_fit_the_pool_is_refused_before_anything_is_written(
    served: tuple[Path, dict[str, Path]],
) -> None:
    spec = read_spec(served[0])
    slots = LoRASlots(spec, 2, 4, ("q_proj", "v_proj"), torch.float32, torch.device("cpu"))
    q = spec.linear("q_proj")

    def pair(rank: int, n_in: int = q.in_features) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones(rank, n_in), torch.ones(q.out_features, rank)

    good = {(0, "q_proj"): pair(4)}
    refused: list[tuple[int, int, dict[Any, Any], str]] = [
        (2, 4, good, "max_loras=2"),
        (-1, 4, good, "max_loras=2"),
        (0, 8, {(0, "q_proj"): pair(8)}, "max_lora_rank=4"),
        (0, 4, good | {(0, "up_proj"): pair(4)}, "up_proj.*target_modules"),
        (0, 4, good | {(9, "q_proj"): pair(4)}, "layer 9"),
        (0, 4, good | {(1, "q_proj"): pair(4, 63)}, r"expected .*found \(4, 63\)"),
        (0, 2, good, "rank <= 2"),
    ]
    for slot, rank, tensors, message in refused:
        with pytest.raises(ConfigError, match=message):
            slots.write(slot, SimpleNamespace(rank=rank, tensors=tensors))
    assert all(not p.a.any() for layer in slots.layers for p in layer.values())

    with pytest.raises(ConfigError, match="lm_head"):
        LoRASlots(spec, 2, 4, ("q_proj", "lm_head"), torch.float32, torch.device("cpu"))


def test_a_row_with_a_slot_is_refused_when_the_slot_is_empty_or_lora_is_off(
    served: tuple[Path, dict[str, Path]], make_driver: MakeDriver
) -> None:
    for arguments in ({"max_loras": 2}, {"max_loras": 0}):
        driver = make_driver(served[0], **arguments)
        with pytest.raises(ValueError, match="slot 0 holds no adapter"):
            driver.step((driver.add(prompt(1, 3), 0), 3))
