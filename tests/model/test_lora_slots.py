"""The slot pool: its size, what a write leaves behind, and what is refused."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.tiny_models import build_model
from torch import Tensor

from aioengine.errors import ConfigError
from aioengine.model.files.hf_config import read_spec
from aioengine.model.slots.image import AdapterImage, build_image
from aioengine.model.slots.layout import SlotLayout
from aioengine.model.slots.pool import LoRASlots
from aioengine.model.spec import EMBEDDING_MODULES, LORA_MODULES, NO_LAYER, TARGETABLE_MODULES, ModelSpec

Key = tuple[int, str]
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def spec(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return read_spec(build_model(tmp_path_factory.mktemp("model"), request.param))


def keys_of(spec: ModelSpec) -> list[Key]:
    layers = [(layer, module) for layer in range(spec.num_layers) for module in LORA_MODULES]
    return [*layers, *((NO_LAYER, module) for module in EMBEDDING_MODULES)]


def make_adapter(
    spec: ModelSpec, ranks: dict[Key, int], affine: list[Key], seed: int = 0
) -> tuple[Any, dict[Key, Tensor]]:
    """Random matrices, of which none has a zero, and random gains and shifts."""
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) + 0.5

    tensors = {
        key: (values(rank, spec.linear(key[1]).in_features), values(spec.linear(key[1]).out_features, rank))
        for key, rank in ranks.items()
    }
    adapter = SimpleNamespace(rank=max(ranks.values()), digest="", tensors=tensors)
    return adapter, {key: values(2, spec.linear(key[1]).out_features) for key in affine}


def content(slots: LoRASlots, slot: int) -> dict[Key, tuple[Tensor, Tensor, Tensor | None]]:
    """(A [r, in], B [out, r], affine [2, out] or None) of each module, as the kernels see them."""
    found = {}
    for layer, pools in [(NO_LAYER, slots.outer), *enumerate(slots.layers)]:
        for pool in pools.values():
            for j, module in enumerate(pool.modules):
                found[layer, module] = (pool.a(slot, j), pool.b(slot, j), pool.affine(slot, j))
    return found


def check_content(
    slots: LoRASlots, slot: int, tensors: dict[Key, tuple[Tensor, Tensor]], affine: dict[Key, Tensor]
) -> None:
    for key, (a, b, gain_and_shift) in content(slots, slot).items():
        if key in tensors:
            assert torch.equal(a, tensors[key][0].to(a.dtype)), key
            assert torch.equal(b, tensors[key][1].to(a.dtype)), key
        else:
            assert len(a) == b.shape[1] == 0
        if key in affine:
            assert gain_and_shift is not None and torch.equal(gain_and_shift, affine[key].to(a.dtype))
        else:
            assert gain_and_shift is None


@pytest.mark.parametrize("nbytes", [None, 2**20])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.slow
def test_a_slot_holds_exactly_what_was_written_last(spec: ModelSpec, seed: int, nbytes: int | None) -> None:
    """Adapters of any ranks, modules and affines follow each other; nothing remains of the earlier ones."""
    rng = random.Random(seed)
    slots = LoRASlots(spec, 2, 8, TARGETABLE_MODULES, torch.float32, CPU, nbytes=nbytes)
    other, other_affine = make_adapter(spec, dict.fromkeys(keys_of(spec), 8), keys_of(spec), seed=99)
    last = build_image(slots.layout, other, other_affine, torch.float32)
    end = None if nbytes is None else nbytes - last.nbytes
    slots.write(1, last, end)
    for turn in range(6):
        chosen = rng.sample(keys_of(spec), rng.choice([1, 3, len(keys_of(spec))]))
        rank = rng.choice([None, 8])
        ranks = {key: rank or rng.choice([1, 5, 8]) for key in chosen}
        affine_of = rng.sample(chosen, rng.choice([0, 1, len(chosen)]))
        adapter, affine = make_adapter(spec, ranks, affine_of, seed=turn)
        image = build_image(slots.layout, adapter, affine, torch.float32)
        elements = [t.numel() for pair in adapter.tensors.values() for t in pair]
        assert image.nbytes == 4 * (sum(elements) + sum(t.numel() for t in affine.values()))
        slots.write(0, image, None if end is None else rng.randrange(0, end - image.nbytes, 64))
        assert slots.has_affine[0] == bool(affine_of)
        check_content(slots, 0, adapter.tensors, affine)
    check_content(slots, 1, other.tensors, other_affine)


def test_a_write_that_failed_leaves_nothing_for_the_next(
    spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots = LoRASlots(spec, 1, 8, LORA_MODULES, torch.float32, CPU)
    layers = keys_of(spec)[: -len(EMBEDDING_MODULES)]
    full, affine = make_adapter(spec, dict.fromkeys(layers, 8), layers)
    small, _ = make_adapter(spec, {(0, "q_proj"): 2}, [])
    real = torch._foreach_copy_

    def half(targets: list[Tensor], sources: list[Tensor]) -> None:
        count = len(targets) // 2 + 1
        real(targets[:count], sources[:count])
        raise RuntimeError("no more memory")

    image = build_image(slots.layout, full, affine, torch.float32)
    monkeypatch.setattr(torch, "_foreach_copy_", half)
    with pytest.raises(RuntimeError, match="no more memory"):
        slots.write(0, image)
    monkeypatch.undo()
    assert slots.memory.memory.any(), "or nothing was half-written"
    slots.write(0, build_image(slots.layout, small, {}, torch.float32))
    check_content(slots, 0, small.tensors, {})


def test_an_adapter_of_the_largest_rank_everywhere_fills_its_slot(spec: ModelSpec) -> None:
    layout = SlotLayout(spec, 8, TARGETABLE_MODULES)
    plain, affine = make_adapter(spec, dict.fromkeys(keys_of(spec), 8), keys_of(spec))
    assert build_image(layout, plain, affine, torch.float32).nbytes == layout.elements * 4


def test_what_does_not_fit_is_refused_before_anything_is_written(spec: ModelSpec) -> None:
    slots = LoRASlots(spec, 2, 4, ("q_proj", "v_proj"), torch.float32, CPU)
    n_in, n_out = spec.linear("q_proj")
    tensors = {(0, "q_proj"): (torch.ones(4, n_in), torch.ones(n_out, 4))}

    def image(of: LoRASlots) -> AdapterImage:
        adapter = SimpleNamespace(rank=4, digest="", tensors=tensors)
        return build_image(of.layout, adapter, {}, torch.float32)

    for slot in (2, -1):
        with pytest.raises(ConfigError, match="max_loras=2"):
            slots.write(slot, image(slots))
    elsewhere = LoRASlots(spec, 2, 8, ("q_proj", "v_proj"), torch.float32, CPU)
    with pytest.raises(ConfigError, match="another model, max_lora_rank or target_modules"):
        elsewhere.write(0, image(slots))
    elastic = LoRASlots(spec, 2, 4, ("q_proj", "v_proj"), torch.float32, CPU, nbytes=4096)
    for offset in (2112, -64):
        with pytest.raises(ConfigError, match="memory of 4096 bytes"):
            elastic.write(0, image(elastic), offset)
    assert not any(pool.memory.memory.any() for pool in (slots, elsewhere, elastic))
    with pytest.raises(ConfigError, match="norm"):
        LoRASlots(spec, 2, 4, ("q_proj", "norm"), torch.float32, CPU)
