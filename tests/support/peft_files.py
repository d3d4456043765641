"""Adapters of a tiny model, saved by PEFT itself, and what to do to them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from aioengine.adapters.peft.folder import naming
from aioengine.adapters.peft.pack import PackedAdapter
from aioengine.adapters.peft.read import AdapterReader
from aioengine.errors import AdapterError, AdapterInvalid
from aioengine.model.slots.layout import SlotLayout
from aioengine.model.spec import LORA_MODULES, ModelSpec, RopeSpec

SPEC = ModelSpec(
    family="llama",
    vocab_size=64,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    rms_norm_eps=1e-5,
    max_position=64,
    rope=RopeSpec(),
    tie_embeddings=False,
)
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"


def base_model(tie: bool = False) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=SPEC.vocab_size,
        hidden_size=SPEC.hidden_size,
        intermediate_size=SPEC.intermediate_size,
        num_hidden_layers=SPEC.num_layers,
        num_attention_heads=SPEC.num_heads,
        num_key_value_heads=SPEC.num_kv_heads,
        max_position_embeddings=SPEC.max_position,
        tie_word_embeddings=tie,
    )
    return transformers.LlamaForCausalLM(config)


def make(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    tie: bool = False,
    save: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """A random adapter saved by PEFT itself; ``save`` goes to ``save_pretrained``."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "init_lora_weights": False, **options})
    model = peft.get_peft_model(base_model(tie), config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_magnitude" in name:
            parameter.data *= 1 + 0.1 * torch.rand_like(parameter)
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    model.save_pretrained(str(folder), **(save or {}))


def read(folder: Path, spec: ModelSpec = SPEC, **options: Any) -> PackedAdapter:
    """As for a part of a mix, for a slot of rank 16 with the seven linears unless ``options`` say otherwise;
    of the base model there is nothing to compare with unless ``base_weight`` is among them."""
    max_rank, modules = options.pop("max_rank", 16), options.pop("target_modules", LORA_MODULES)
    slot = options.pop("slot", None) or SlotLayout(spec, max_rank, modules)
    base_weight, known = options.pop("base_weight", lambda _: torch.empty(0)), options.pop("known", {})
    dtype, finite = options.pop("dtype", torch.float32), options.pop("finite", True)
    with naming("sql", str(folder)):
        reader = AdapterReader(slot, dtype, base_weight, known)
        found = reader.read("sql", str(folder), **options)
        if finite:
            found.check_finite(dtype, slot.spec)
    return found.scaled(dtype)


def peft_layers(folder: Path, tie: bool = False) -> dict[tuple[int, str], Any]:
    """PEFT's adapted layers, as it loads them from the folder, in float32."""
    model = peft.PeftModel.from_pretrained(base_model(tie), str(folder))
    layers: dict[tuple[int, str], Any] = {}
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "get_delta_weight"):
            parts = name.split(".")
            layers[int(parts[2]) if parts[1:2] == ["layers"] else -1, parts[-1]] = layer
    return layers


def peft_deltas(folder: Path, tie: bool = False) -> dict[tuple[int, str], torch.Tensor]:
    """The weight change [out, in] of each adapted linear."""
    return {
        place: delta.T if place[1] == "embed_tokens" else delta
        for place, layer in peft_layers(folder, tie).items()
        for delta in [layer.get_delta_weight("default").detach()]
    }


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def refused(folder: Path, *words: str, kind: type[AdapterError] = AdapterInvalid, **options: Any) -> None:
    with pytest.raises(kind) as caught:
        read(folder, **options)
    assert type(caught.value) is kind
    for word in ("'sql'", str(folder), *words):
        assert word in str(caught.value)
