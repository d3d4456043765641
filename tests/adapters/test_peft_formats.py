"""What PEFT can train beside plain LoRA: read exactly, or refused with the reason. PEFT writes every file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from support.peft_files import (
    CONFIG,
    PREFIX,
    SPEC,
    WEIGHTS,
    base_model,
    edit_config,
    edit_weights,
    make,
    peft_deltas,
    peft_layers,
    read,
    refused,
)

from aioengine.model.spec import LORA_MODULES, TARGETABLE_MODULES

TIED = msgspec.structs.replace(SPEC, tie_embeddings=True)
EMBEDDING = "base_model.model.model.embed_tokens"
WITHOUT_BASE = {"save_embedding_layers": False}

pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers`",
    "ignore:Model has `tie_word_embeddings",
    "ignore:Model with `tie_word_embeddings",
    "ignore:`lora_bias=True` was passed",
    "ignore:Adapter 'default'.*lora_B.bias",  # a false alarm of PEFT's
    "ignore:The following (rank|alpha)_pattern keys did not match",
)


def assert_deltas(folder: Path, tie: bool = False, **options: Any) -> None:
    expected = peft_deltas(folder, tie)
    packed = read(folder, TIED if tie else SPEC, target_modules=TARGETABLE_MODULES, **options)
    assert packed.tensors.keys() == expected.keys()
    for place, (a, b) in packed.tensors.items():
        torch.testing.assert_close(b @ a, expected[place])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rslora", [False, True])
def test_dora(tmp_path: Path, dtype: torch.dtype, rslora: bool) -> None:
    modules = [*LORA_MODULES, "lm_head", "embed_tokens"]
    make(tmp_path, dtype, target_modules=modules, use_dora=True, use_rslora=rslora, save=WITHOUT_BASE)
    assert_deltas(tmp_path)
    layers = peft_layers(tmp_path)
    packed = read(tmp_path, target_modules=TARGETABLE_MODULES, dtype=dtype)
    assert packed.magnitudes.keys() == layers.keys()
    for place, magnitude in packed.magnitudes.items():
        assert magnitude.dtype == torch.float32
        assert torch.equal(magnitude, layers[place].lora_magnitude_vector["default"].weight.float())
    assert not packed.biases


@pytest.mark.parametrize("suffix", [".default.weight", ".weight", ".default"])
def test_other_names_of_dora_magnitudes(tmp_path: Path, suffix: str) -> None:
    make(tmp_path, target_modules=["q_proj"], use_dora=True)
    expected = read(tmp_path).magnitudes

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.endswith("lora_magnitude_vector")]:
            tensors[key + suffix] = tensors.pop(key)

    edit_weights(tmp_path, rename)
    actual = read(tmp_path).magnitudes
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[place], expected[place]) for place in actual)


def test_incomplete_dora(tmp_path: Path) -> None:
    make(tmp_path, target_modules=["q_proj"], use_dora=True)
    edit_config(tmp_path, use_dora=False)
    refused(tmp_path, WEIGHTS, "lora_magnitude_vector", "does not set use_dora")
    edit_config(tmp_path, use_dora=True)
    edit_weights(tmp_path, lambda t: t.update({f"{PREFIX}.lora_magnitude_vector": torch.ones(31)}))
    refused(tmp_path, WEIGHTS, f"{PREFIX}.lora_magnitude_vector", "[32]", "[31]")
    edit_weights(tmp_path, lambda t: t.pop(f"{PREFIX}.lora_magnitude_vector"))
    refused(tmp_path, WEIGHTS, PREFIX, "no matching lora_magnitude_vector")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_bias(tmp_path: Path, dtype: torch.dtype) -> None:
    modules = [*LORA_MODULES, "lm_head"]
    make(tmp_path, dtype, target_modules=modules, lora_bias=True, save=WITHOUT_BASE)
    assert_deltas(tmp_path)
    layers = peft_layers(tmp_path)
    packed = read(tmp_path, target_modules=TARGETABLE_MODULES, dtype=dtype)
    assert packed.biases.keys() == layers.keys()
    for place, bias in packed.biases.items():
        expected = layers[place].lora_B["default"].bias * layers[place].scaling["default"]
        assert torch.equal(bias, expected.to(dtype))
    assert not packed.magnitudes
    edit_weights(tmp_path, lambda t: t.pop(f"{PREFIX}.lora_B.bias"))
    refused(tmp_path, WEIGHTS, PREFIX, "no matching lora_B.bias", target_modules=TARGETABLE_MODULES)
    edit_config(tmp_path, lora_bias=False)
    refused(tmp_path, WEIGHTS, "bias", "does not set lora_bias", target_modules=TARGETABLE_MODULES)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("modules", [["embed_tokens"], ["lm_head", "q_proj"], ["lm_head", "embed_tokens"]])
def test_embeddings(tmp_path: Path, modules: list[str], tie: bool) -> None:
    patterns = {"rank_pattern": {"embed_tokens": 7}, "alpha_pattern": {"lm_head": 3}}
    make(tmp_path, tie=tie, target_modules=modules, save=WITHOUT_BASE, **patterns)
    assert_deltas(tmp_path, tie)
    refused(tmp_path, WEIGHTS, "add", "to LoRAConfig.target_modules")


def test_embeddings_by_regex(tmp_path: Path) -> None:
    make(tmp_path, target_modules=r".*q_proj|.*embed_tokens|lm_head", save=WITHOUT_BASE)
    assert_deltas(tmp_path)


def test_wrong_embedding_tensors(tmp_path: Path) -> None:
    make(tmp_path, target_modules=["embed_tokens"], save=WITHOUT_BASE)
    options = {"target_modules": TARGETABLE_MODULES}
    edit_weights(tmp_path, lambda t: t.update({f"{EMBEDDING}.lora_embedding_A": torch.ones(4, 65)}))
    refused(tmp_path, WEIGHTS, f"{EMBEDDING}.lora_embedding_A", "[4, 64]", "[4, 65]", **options)
    edit_weights(tmp_path, lambda t: t.pop(f"{EMBEDDING}.lora_embedding_A"))
    refused(tmp_path, WEIGHTS, f"{EMBEDDING}.lora_embedding_B", "no matching lora_A", **options)
    edit_config(tmp_path, lora_bias=True)
    refused(tmp_path, CONFIG, "lora_bias", "embed_tokens", **options)


@pytest.mark.parametrize("adapt_both", [False, True])
def test_one_adapter_for_tied_embeddings(tmp_path: Path, adapt_both: bool) -> None:
    """PEFT then adapts the head by the transposed adapter of the embeddings, whether it is named or not."""
    modules = ["embed_tokens", "q_proj"] + ["lm_head"] * adapt_both
    make(tmp_path, tie=True, target_modules=modules, ensure_weight_tying=True, save=WITHOUT_BASE)
    assert_deltas(tmp_path, tie=True)
    packed = read(tmp_path, TIED, target_modules=TARGETABLE_MODULES)
    (head_a, head_b), (a, b) = packed.tensors[-1, "lm_head"], packed.tensors[-1, "embed_tokens"]
    torch.testing.assert_close((head_b @ head_a).T, b @ a)

    refused(tmp_path, WEIGHTS, "lm_head", "does not target", target_modules=TARGETABLE_MODULES)
    edit_weights(tmp_path, lambda t: t["base_model.model.lm_head.lora_A.weight"].add_(1))
    with pytest.raises(Exception, match=r"ensure_weight_tying.*differ"):
        read(tmp_path, TIED, target_modules=TARGETABLE_MODULES)


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_weights_saved_along(tmp_path: Path, module: str, dtype: torch.dtype) -> None:
    """PEFT does so unless told not to. They are left out once they are known to be those that are served."""
    without, along = tmp_path / "without", tmp_path / "along"
    make(without, dtype, target_modules=[module, "q_proj"], save=WITHOUT_BASE)
    make(along, dtype, target_modules=[module, "q_proj"])
    options: dict[str, Any] = {"target_modules": TARGETABLE_MODULES, "dtype": dtype}
    base = {"embed_tokens": base_model().model.embed_tokens.weight, "lm_head": base_model().lm_head.weight}

    expected, packed = read(without, **options), read(along, base_weight=base.__getitem__, **options)
    assert packed.tensors.keys() == expected.tensors.keys()
    for place, pair in packed.tensors.items():
        assert all(map(torch.equal, pair, expected.tensors[place]))
    assert packed.digest != expected.digest

    refused(along, WEIGHTS, module, "save_embedding_layers=False", **options)
    other = base | {module: base[module] + 1}
    refused(along, WEIGHTS, module, "differ", base_weight=other.__getitem__, **options)
    key = f"base_model.model.{'model.' * (module == 'embed_tokens')}{module}.base_layer.weight"
    edit_weights(along, lambda t: t.update({key: torch.ones(65, 32)}))
    refused(along, WEIGHTS, key, "[64, 32]", "[65, 32]", base_weight=base.__getitem__, **options)


def test_resized_embeddings(tmp_path: Path) -> None:
    make(tmp_path, target_modules=["q_proj"], save={"save_embedding_layers": True})
    refused(tmp_path, WEIGHTS, "lm_head", "resized", target_modules=TARGETABLE_MODULES)


def test_an_adapter_for_another_model(tmp_path: Path) -> None:
    make(tmp_path, target_modules=["q_proj"])
    wider = msgspec.structs.replace(SPEC, hidden_size=64)
    shallow = msgspec.structs.replace(SPEC, num_layers=1)
    with pytest.raises(Exception, match=r"expected shape \[4, 64\].*found \[4, 32\]"):
        read(tmp_path, wider)
    with pytest.raises(Exception, match=r"in one of 1 layers; was the adapter trained on another model"):
        read(tmp_path, shallow)


def test_empty_modules_to_save_is_none(tmp_path: Path) -> None:
    make(tmp_path / "a", target_modules=["q_proj"])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    edit_config(tmp_path / "b", modules_to_save=[])
    assert read(tmp_path / "b").tensors.keys() == read(tmp_path / "a").tensors.keys()


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite(tmp_path: Path, bad: float) -> None:
    make(tmp_path, target_modules=["q_proj"])
    edit_weights(tmp_path, lambda t: t[f"{PREFIX}.lora_A.weight"][1, 2].fill_(bad))
    refused(tmp_path, "model.layers.0.self_attn.q_proj.lora_A", "NaN")
