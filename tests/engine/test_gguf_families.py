"""GGUF files of each native family: token for token what transformers makes of the original."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
import pytest
import torch
from gguf.tensor_mapping import get_tensor_name_map
from safetensors.torch import load_file, save_file
from support.engine_fixtures import MakeEngine, Tiny, greedy, prompt_of
from support.selection import mostly_slow
from support.tiny_gguf import add_sizes, finish, interleaved
from support.tiny_models import build_model

from aioengine.model.files.resolve import read_spec

ARCHITECTURES = {
    "granite": gguf.MODEL_ARCH.GRANITE,
    "smollm3": gguf.MODEL_ARCH.SMOLLM3,
    "olmo2": gguf.MODEL_ARCH.OLMO2,
    "olmo3": gguf.MODEL_ARCH.OLMO2,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "gemma": gguf.MODEL_ARCH.GEMMA,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "glm4": gguf.MODEL_ARCH.GLM4,
}
SLIDING, FULL = "sliding_attention", "full_attention"
OVERRIDES: dict[str, dict[str, Any]] = {
    "smollm3": {"no_rope_layer_interval": 4, "num_hidden_layers": 5},
    "olmo3": {"layer_types": [SLIDING] * 3 + [FULL, SLIDING], "num_hidden_layers": 5},
    "gemma2": {"query_pre_attn_scalar": 32, "final_logit_softcapping": 20.0},
    "gemma3_text": {
        "query_pre_attn_scalar": 32,
        "layer_types": [SLIDING] * 5 + [FULL, SLIDING],
        "num_hidden_layers": 7,
    },
}
"""What a GGUF file of the family can say, and its pattern of layers."""


def write(folder: Path, family: str, kind: str) -> Path:
    """The model in ``folder`` as llama.cpp's converter writes it; its matrices get the values that are
    stored."""
    config = json.loads((folder / "config.json").read_text())
    arch, path = ARCHITECTURES[family], folder / f"{family}.gguf"
    names = get_tensor_name_map(arch, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    _add_metadata(writer, config, family)
    state = load_file(folder / "model.safetensors")
    for name, tensor in state.items():
        # Gemma's heads are tied; these tests have them apart, or a token would be followed by itself.
        stored = names.get_name(name, try_suffixes=(".weight", ".bias")) or "output.weight"
        data, quant = tensor.numpy(), gguf.GGMLQuantizationType[kind if tensor.ndim == 2 else "F32"]
        if family.startswith("gemma") and "norm" in name:
            data = data + np.float32(1)
        raw = gguf.quants.quantize(data, quant)
        if tensor.ndim == 2:
            tensor.copy_(torch.from_numpy(gguf.quants.dequantize(raw, quant).copy()))
        if family in ("granite", "smollm3"):
            for module, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
                raw = interleaved(raw, config[heads]) if module in name else raw
        writer.add_tensor(stored, raw, raw_dtype=quant)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    finish(writer)
    return path


def _add_metadata(writer: gguf.GGUFWriter, config: dict[str, Any], family: str) -> None:
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rope = config.get("rope_parameters") or {}
    full = rope.get("full_attention", rope)
    add_sizes(writer, config, full.get("rope_theta", 10000.0))
    if family.startswith("gemma"):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if family in ("phi3", "glm4"):
        writer.add_rope_dimension_count(int(head_dim * full["partial_rotary_factor"]))
    if config.get("sliding_window") and family != "smollm3":
        writer.add_sliding_window(config["sliding_window"])
    if family == "granite":
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])
    if config.get("attn_logit_softcapping") and family == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
@pytest.mark.parametrize("family", mostly_slow(ARCHITECTURES, *list(ARCHITECTURES)[:2]))
async def test_a_gguf_file_is_the_model_that_it_was_made_of(
    family: str, kind: str, tmp_path: Path, make_engine: MakeEngine
) -> None:
    folder = build_model(tmp_path / "model", family, **OVERRIDES.get(family, {}))
    path = write(folder, family, kind)
    ours, original = read_spec(path), read_spec(folder)
    if family.startswith("gemma"):
        assert ours.norm_offset == 0
    same = {name: getattr(original, name) for name in ("norm_offset", "packed", "dtype", "eos_token_ids")}
    assert msgspec.structs.replace(ours, **same) == original
    if kind == "F32":
        return
    assert {packing.format for packing in ours.packed.values()} == {"q8_0"}
    prompts = [prompt_of(i, n) for i, n in enumerate((5, 33))]
    async with make_engine(Tiny(path, {}), block_size=16) as engine:
        for prompt in prompts:
            output = await engine.complete(prompt, greedy(8))
            assert output.token_ids == Tiny(folder, {}).expected(prompt, 8)
