"""Damaged checkpoints, most of models that transformers runs: refused with what is wrong, and where."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.any_models import config_of, randomize
from support.selection import mostly_slow
from support.served_models import engine_of, refused
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
FAMILIES = ["gpt_neox", "deepseek_v3"]
"""One whose files have its parameters, and one in which experts are stacked when they are loaded."""
Tensors = dict[str, Tensor]


def in_layer(tensors: Tensors, part: str = "") -> str:
    """A matrix of the last layer."""
    return next(k for k in sorted(tensors) if ".layers.1." in k and part in k and tensors[k].dim() == 2)


def longer(tensors: Tensors, part: str = "") -> str:
    key = in_layer(tensors, part)
    tensors[key] = torch.cat([tensors[key], tensors[key]])
    return key


def missing(tensors: Tensors) -> str:
    key = in_layer(tensors, "dense" if "embed_out.weight" in tensors else "o_proj")
    del tensors[key]
    return key


def with_value(value: float) -> Callable[[Tensors], str]:
    def change(tensors: Tensors) -> str:
        key = in_layer(tensors, "att")
        tensors[key][0, 0] = value
        return key

    return change


def of_dtype(dtype: torch.dtype) -> Callable[[Tensors], str]:
    def change(tensors: Tensors) -> str:
        key = in_layer(tensors)
        tensors[key] = tensors[key].to(dtype)
        return key

    return change


def layer_beyond(tensors: Tensors) -> str:
    for body in ("model", "gpt_neox"):
        tensors[f"{body}.layers.7.surprise.weight"] = torch.zeros(2)
    return ".layers.7.surprise.weight"


DAMAGES: dict[str, tuple[Callable[[Tensors], str], str]] = {
    "longer": (lambda tensors: longer(tensors, "att"), "expected shape"),
    "missing": (missing, "missing"),
    "nan": (with_value(float("nan")), "values that are not"),
    "inf": (with_value(float("inf")), "values that are not"),
    "int32": (of_dtype(torch.int32), "expected floating point, found I32"),
    "complex": (of_dtype(torch.complex64), "expected floating point, found C64"),
    "layer": (layer_beyond, "has no place for it"),
}


def saved(folder: Path, family: str, **more: Any) -> Path:
    model: Any = transformers.AutoModelForCausalLM.from_config(config_of(family))
    randomize(model).save_pretrained(folder, **more)
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("family", mostly_slow(FAMILIES, "gpt_neox"))
async def test_a_damaged_tensor(family: str, damage: str, tmp_path: Path) -> None:
    file = saved(tmp_path, family) / "model.safetensors"
    tensors = load_file(file)
    change, words = DAMAGES[damage]
    key = change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    await refused(tmp_path, key, words)


async def test_an_expert_of_another_shape(tmp_path: Path) -> None:
    file = saved(tmp_path, "deepseek_v3") / "model.safetensors"
    tensors = load_file(file)
    longer(tensors, "experts.2.down")
    save_file(tensors, file, metadata={"format": "pt"})
    await refused(tmp_path, "cannot load the weights", "does not belong to this config.json")


async def test_a_layer_less_than_the_checkpoint_has(tmp_path: Path) -> None:
    path = saved(tmp_path, "gpt_neox") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 1}))
    await refused(tmp_path, "unexpected parameter gpt_neox.layers.1.", "has no place for it")


async def test_a_head_that_is_tied_but_stored_with_other_values(tmp_path: Path) -> None:
    """transformers does not tie it then, so the native decoder must not either."""
    path = saved(tmp_path, "llama", max_shard_size="20KB") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    await refused(tmp_path, "lm_head.weight differs from model.embed_tokens.weight", model_impl="native")
    equal = tmp_path / "equal"
    file = saved(equal, "llama") / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    (equal / "config.json").write_text(path.read_text())
    async with engine_of(equal, model_impl="native") as engine:
        assert engine.info.model_impl == "native"


async def test_sizes_of_zero(tmp_path: Path) -> None:
    path = saved(tmp_path, "deepseek_v3") / "config.json"
    text = json.loads(path.read_text())
    for name in ("num_attention_heads", "hidden_size", "num_key_value_heads", "n_routed_experts"):
        path.write_text(json.dumps(text | {name: 0}))
        await refused(tmp_path, str(tmp_path))


async def test_more_layers_than_any_model_has(tmp_path: Path) -> None:
    for family in (*FAMILIES, "llama"):
        config_of(family, num_hidden_layers=2).save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 10**9}))
        await refused(tmp_path, "num_hidden_layers=1000000000", "must be <=")
