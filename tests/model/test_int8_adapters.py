"""Adapters in int8: what is stored, what it takes, and what is computed with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.random_slots import fill_slot, random_image
from support.tiny_models import ALL_MODULES, build_adapter, build_model
from torch import Tensor

from aioengine.config import EngineConfig, LoRAConfig
from aioengine.errors import ConfigError
from aioengine.executors.parts import plan_parts
from aioengine.kernels import available_backends
from aioengine.model.files.hf_config import read_spec
from aioengine.model.slots.image import build_image
from aioengine.model.slots.layout import SlotLayout
from aioengine.model.slots.pool import LoRASlots
from aioengine.model.spec import LORA_MODULES, TARGETABLE_MODULES, ModelSpec
from aioengine.step import Sampled, SequenceWork

MakeDriver = Callable[..., Any]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # peft's, of tied heads and embeddings
CPU = torch.device("cpu")

ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {"r": 16},
    "rank-5": {"r": 5, "target_modules": ["q_proj", "o_proj", "up_proj"]},
    "rank-1": {"r": 1, "target_modules": ["gate_proj", "down_proj"]},
    "dora": {"r": 8, "use_dora": True},
    "bias": {"lora_bias": True, "target_modules": ["q_proj", "down_proj"]},
    "outer": {"r": 12, "target_modules": ["embed_tokens", "lm_head", "k_proj"]},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("int8")
    model = build_model(root / "model", "llama")
    for i, (name, config) in enumerate(ADAPTERS.items()):
        build_adapter(model, root / name, seed=i, **config)
    return root


@pytest.fixture(scope="module")
def spec(root: Path) -> ModelSpec:
    found = read_spec(root / "model")
    assert isinstance(found, ModelSpec)
    return found


def matrices(slots: LoRASlots, slot: int) -> list[tuple[Tensor, Tensor]]:
    """A and B of every place, as they are computed with."""
    pools = [*slots.outer.values(), *(pool for layer in slots.layers for pool in layer.values())]
    return [(pool.a(slot, j), pool.b(slot, j)) for pool in pools for j in range(len(pool.modules))]


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([1, 3, 8, 16]), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans())
@pytest.mark.slow
def test_nothing_is_off_by_more_than_half_a_step(
    spec: ModelSpec, rank: int, dtype: torch.dtype, affine: bool
) -> None:
    exact = LoRASlots(spec, 1, 16, TARGETABLE_MODULES, dtype, CPU)
    slots = LoRASlots(spec, 1, 16, TARGETABLE_MODULES, torch.int8, CPU, affine_dtype=dtype)
    for holds in (exact, slots):
        fill_slot(holds, 0, rank, torch.Generator().manual_seed(rank), affine=affine)
    assert slots.has_affine == [affine]
    for (a, b), (found, whole) in zip(matrices(exact, 0), matrices(slots, 0), strict=True):
        assert whole.dtype == torch.int8 and (found.shape, whole.shape) == (a.shape, b.shape)
        of_b = b.float().abs().amax(0) / 127
        assert ((whole * of_b - b.float()).abs() <= 0.501 * of_b).all()
        of_a = a.float().abs().amax(1, keepdim=True) / 127
        assert ((found / of_b[:, None] - a.float()).abs() <= 0.501 * of_a).all()
    for layer, expected in zip(slots.layers, exact.layers, strict=True):
        for name, pool in layer.items():
            for j in range(len(pool.modules)):
                values, others = pool.affine(0, j), expected[name].affine(0, j)
                assert (values is None) == (others is None) == (not affine)
                assert values is None or others is None or torch.equal(values, others)


def test_what_is_not_finite_does_not_become_a_number(spec: ModelSpec) -> None:
    slots = LoRASlots(spec, 1, 4, LORA_MODULES, torch.int8, CPU, affine_dtype=torch.float32)
    n_in, n_out = spec.linear("q_proj")
    a, b = torch.randn(4, n_in), torch.randn(n_out, 4)
    a[1, 3], b[7, 2] = torch.inf, torch.nan
    adapter = SimpleNamespace(rank=4, digest="", tensors={(0, "q_proj"): (a, b)})
    slots.write(0, build_image(slots.layout, adapter, {}, torch.float32))
    assert slots.layers[0]["qkv"].a(0, 0).isnan().any(1).tolist() == [False, True, True, False]


class Logits:
    """A sampler that keeps what it saw."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, logits: Tensor, rows: Sequence[SequenceWork]) -> list[Sampled]:
        self.seen.append(logits.clone())
        return [Sampled(0) for _ in rows]


@pytest.mark.parametrize("kernels", [None, *available_backends("cpu")])
@pytest.mark.slow
def test_steps_compute_with_what_the_slots_hold(
    root: Path, kernels: str | None, make_driver: MakeDriver
) -> None:
    """Slots of float32 that hold the same numbers give the same logits; the adapters themselves, nearly."""
    found = []
    for kind in ("int8", "same", "exact"):
        sample = Logits()
        driver = make_driver(
            root / "model", max_loras=len(ADAPTERS), max_lora_rank=16, target_modules=TARGETABLE_MODULES,
            sample=sample, kernels=kernels, block_size=16,
            lora_dtype=torch.int8 if kind == "int8" else torch.float32,
        )  # fmt: skip
        for slot, name in enumerate(ADAPTERS):
            driver.load(slot, root / name)
        slots = driver.runner.lora_slots
        if kind == "int8":
            held = [matrices(slots, slot) for slot in range(len(ADAPTERS))]
        if kind == "same":
            memory, outputs = (
                slots.memory,
                [place.shape.out_features for place in slots.layout.places.values()],
            )
            turned, memory.turned = memory.turned, False
            for slot in range(len(ADAPTERS)):
                for targets, sources in zip(matrices(slots, slot), held[slot], strict=True):
                    for target, source in zip(targets, sources, strict=True):
                        target.copy_(source)
                if turned:
                    memory.turn(memory.table[slot], outputs)
            memory.turned = turned
        sequences = [driver.add(range(5, 9 + 3 * slot), slot) for slot in range(-1, len(ADAPTERS))]
        for _ in range(2):
            driver.step(*((s, len(s.tokens) - s.computed) for s in sequences))
        found.append(torch.stack(sample.seen))
    int8, same, exact = found
    torch.testing.assert_close(int8, same, rtol=3e-4, atol=3e-4)
    assert torch.equal(int8[:, 0], exact[:, 0]), "the base model's"
    errors = (int8 - exact).norm(dim=2) / exact.norm(dim=2)
    assert (errors[:, 1:] < 0.03).all() and (errors[:, 1:] > 0).all()


def test_int8_adapters_of_a_model_in_float16_are_refused(root: Path) -> None:
    small: dict[str, Any] = {
        "max_model_len": 64,
        "kv_cache_memory": "1MiB",
        "lora": LoRAConfig(lora_dtype="int8"),
    }
    with pytest.raises(ConfigError, match=r"lora_dtype='int8' with dtype='float16'.*set dtype='bfloat16'"):
        plan_parts(EngineConfig(model=str(root / "model"), dtype="float16", **small))


def test_slots_of_another_kind_refuse_an_image(spec: ModelSpec) -> None:
    image = random_image(SlotLayout(spec, 16, ALL_MODULES), 4, torch.Generator(), torch.float32)
    slots = LoRASlots(spec, 1, 16, ALL_MODULES, torch.int8, CPU, affine_dtype=torch.float32)
    with pytest.raises(ConfigError, match="another lora_dtype"):
        slots.write(0, image)
