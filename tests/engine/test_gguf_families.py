"""GGUF files of each native family: token for token what transformers makes of the original."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import msgspec
import pytest
from gguf.tensor_mapping import get_tensor_name_map
from safetensors.torch import load_file, save_file
from support.engine_fixtures import MakeEngine, Tiny, check_tokens, prompt_of
from support.selection import mostly_slow
from support.tiny_gguf import ENDS, ModelWriter, finish
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
    writer = ModelWriter(path, gguf.MODEL_ARCH_NAMES[arch], config, ENDS)
    state = load_file(folder / "model.safetensors")
    for name, tensor in state.items():
        # Gemma's heads are tied; these tests have them apart, or a token would be followed by itself.
        stored = names.get_name(name, try_suffixes=(".weight", ".bias")) or "output.weight"
        norm = family.startswith("gemma") and "norm" in name
        writer.store(stored, tensor + 1 if norm else tensor, kind if tensor.ndim == 2 else "F32")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    finish(writer)
    return path


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
    async with make_engine(Tiny(path, {}), block_size=16) as engine:
        await check_tokens(engine, Tiny(folder, {}), [(prompt_of(n, n), None) for n in (5, 33)], 8)
