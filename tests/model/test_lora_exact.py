"""LoRA through the slots: logits against those of peft in float32, and who pays for them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.selection import mostly_slow
from support.tiny_models import ALL_MODULES, build_adapter, build_model, reference_generate, reference_logits
from torch import Tensor

from aioengine.model.spec import TARGETABLE_MODULES
from aioengine.step import Sampled, SequenceWork

MakeDriver = Callable[..., Any]

# peft warns of what these tests are about: biases, embeddings, tied heads.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {},
    "dora": {"use_dora": True, "r": 16},
    "rslora-dora": {
        "r": 9,
        "lora_alpha": 6,
        "use_rslora": True,
        "use_dora": True,
        "target_modules": ["k_proj", "v_proj", "up_proj", "down_proj"],
    },
    "bias": {"lora_bias": True, "target_modules": ["q_proj", "o_proj", "up_proj"]},
    "head-only-dora": {"target_modules": ["lm_head"], "use_dora": True},
    "head-bias": {"target_modules": ["lm_head", "down_proj"], "lora_bias": True},
    "embedding-dora": {"target_modules": ["embed_tokens", "k_proj"], "use_dora": True},
    "everything": {"target_modules": [*ALL_MODULES, "embed_tokens", "lm_head"], "r": 12},
}
"""What peft is told."""


def prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(3, 256), k=length)


@pytest.fixture(scope="module", params=mostly_slow(["llama", "llama-tied", "qwen2", "qwen3"], "qwen2"))
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Path]]:
    """A model and its adapters, on disk."""
    root = tmp_path_factory.mktemp(request.param)
    family, _, tied = request.param.partition("-")
    model = build_model(root / "model", family, tie_word_embeddings=bool(tied))
    adapters = {
        name: build_adapter(model, root / name, seed=i, **config)
        for i, (name, config) in enumerate(ADAPTERS.items())
    }
    return model, adapters


def test_logits_equal_pefts(served: tuple[Path, dict[str, Path]], make_driver: MakeDriver) -> None:
    """In one batch, and so do those of the base model beside them."""
    model, adapters = served
    seen: list[Tensor] = []

    def sample(logits: Tensor, rows: Sequence[SequenceWork]) -> list[Sampled]:
        seen.append(logits)
        return [Sampled(0) for _ in rows]

    names = list(ADAPTERS)
    driver = make_driver(
        model, max_loras=len(names), max_lora_rank=16, sample=sample, target_modules=TARGETABLE_MODULES
    )
    for slot, name in enumerate(names):
        driver.load(slot, adapters[name])
    sequences = [driver.add(prompt(slot, 30 - slot), slot) for slot in range(-1, len(names))]
    driver.step(*((sequence, len(sequence.tokens)) for sequence in sequences))
    for slot, found in enumerate(seen[0], start=-1):
        adapter = adapters[names[slot]] if slot >= 0 else None
        expected = reference_logits(model, prompt(slot, 30 - slot), adapter)[-1]
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)


def test_a_pool_in_another_dtype_than_the_model(
    served: tuple[Path, dict[str, Path]], tmp_path: Path, make_driver: MakeDriver
) -> None:
    """A bfloat16 pool, with bfloat16 weights in the file, loses nothing under a float32 model."""
    model, _ = served
    adapter = build_adapter(model, tmp_path / "bf16", r=4, lora_alpha=8, dtype=torch.bfloat16)
    outputs = []
    for lora_dtype in (torch.bfloat16, torch.float32):
        driver = make_driver(model, max_loras=1, max_lora_rank=4, lora_dtype=lora_dtype)
        driver.load(0, adapter)
        sequence = driver.add(prompt(1, 12), 0)
        driver.run(sequence, new_tokens=12)
        outputs.append(sequence.output)
    assert outputs[0] == outputs[1] == reference_generate(model, prompt(1, 12), 12, adapter)


def test_only_batches_with_dora_or_biases_pay_for_them(
    served: tuple[Path, dict[str, Path]], make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, adapters = served
    driver = make_driver(model, max_loras=3, max_lora_rank=16)
    for slot, name in enumerate(("all", "dora", "bias")):
        driver.load(slot, adapters[name])
    calls: list[int] = []
    kernels = driver.runner.model.kernels
    affine = kernels.lora_affine
    monkeypatch.setattr(kernels, "lora_affine", lambda *args: (calls.append(1), affine(*args)))
    for slots, expected in (((-1, 0), 0), ((-1, 0, 1), 12), ((2,), 12)):
        calls.clear()
        driver.step(*((driver.add(prompt(slot, 4), slot), 4) for slot in slots))
        assert len(calls) == expected, "three layers of four linears, or nothing"


def test_a_row_with_a_slot_is_refused_when_the_slot_is_empty_or_lora_is_off(
    served: tuple[Path, dict[str, Path]], make_driver: MakeDriver
) -> None:
    for arguments in ({"max_loras": 2}, {"max_loras": 0}):
        driver = make_driver(served[0], **arguments)
        with pytest.raises(ValueError, match="slot 0 holds no adapter"):
            driver.step((driver.add(prompt(1, 3), 0), 3))
