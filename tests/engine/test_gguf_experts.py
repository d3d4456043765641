"""GGUF files of models with experts: token for token what transformers makes of the original."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import gguf
import msgspec
import pytest
import torch
from gguf.tensor_mapping import get_tensor_name_map
from safetensors.torch import load_file
from support.moe_adapters import NAMES, USUAL, MoeModel
from support.selection import mostly_slow_rows
from support.served_models import engine_of, prompt
from support.tiny_gguf import ENDS, ModelWriter, finish

from aioengine import SamplingParams
from aioengine.errors import ConfigError
from aioengine.model.files.resolve import read_spec

ARCHITECTURES = {
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "qwen2_moe": gguf.MODEL_ARCH.QWEN2MOE,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "olmoe": gguf.MODEL_ARCH.OLMOE,
    "gpt_oss": gguf.MODEL_ARCH.GPT_OSS,
}
OVERRIDES: dict[str, dict[str, Any]] = {
    "mixtral": {"sliding_window": None},
    "qwen2_moe": {"shared_expert_intermediate_size": 64},
    "qwen3_moe": {"norm_topk_prob": True},
    "olmoe": {},
    "gpt_oss": {},
}


def write(model: MoeModel, kind: str, **metadata: int) -> Path:
    """The model as llama.cpp's converter writes it; the one in memory gets the values that are stored. Of
    MXFP4 are experts alone, beside Q8_0, as in the files that GPT-OSS comes in."""
    config, arch = json.loads((model.folder / "config.json").read_text()), ARCHITECTURES[model.family]
    path = model.folder.parent / f"{kind}.gguf"
    own = gguf.MODEL_ARCH_NAMES[arch]
    metadata = {f"{own}.{key}": value for key, value in metadata.items()}
    writer = ModelWriter(path, own, config, ENDS | metadata)
    names = get_tensor_name_map(arch, config["num_hidden_layers"])
    for name, tensor in _stacked(model, load_file(model.folder / "model.safetensors")).items():
        is_matrix = tensor.ndim > 1 and not name.endswith(("_exps.bias", "shared_expert_gate.weight"))
        stored = name if name.startswith("blk.") else names.get_name(name, try_suffixes=(".weight", ".bias"))
        stored = f"{stored}.weight" if name.endswith(".sinks") else stored
        data = tensor[0] if name.endswith("shared_expert_gate.weight") else tensor
        kind_of = "Q8_0" if kind == "MXFP4" and tensor.ndim < 3 else kind
        writer.store(stored, data, kind_of if is_matrix else "F32")
        _put(model, name, tensor)
    finish(writer)
    return path


PARTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")


def _stacked(model: MoeModel, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    block, *linears = NAMES.get(model.family, USUAL)
    found = {name: tensor for name, tensor in state.items() if ".experts." not in name}
    for i in range(len(model.base.model.layers)):
        if model.family == "gpt_oss":  # stacked already: [experts, in, out], outputs of gate and up alternate
            stem = f"model.layers.{i}.mlp.experts"
            for kind, suffix in (("weight", ""), ("bias", "_bias")):
                gate_up, down = (state[f"{stem}.{name}{suffix}"] for name in ("gate_up_proj", "down_proj"))
                parts = (gate_up[..., ::2], gate_up[..., 1::2], down)
                for part, tensor in zip(PARTS, parts, strict=True):
                    turned = tensor.transpose(1, 2) if kind == "weight" else tensor
                    found[f"blk.{i}.{part}.{kind}"] = turned.contiguous()
            continue
        for part, linear in zip(PARTS, linears, strict=True):
            prefix = f"model.layers.{i}.{block}.experts"
            count = sum(name.startswith(prefix) and name.endswith(f"{linear}.weight") for name in state)
            own = [state[f"{prefix}.{expert}.{linear}.weight"] for expert in range(count)]
            found[f"blk.{i}.{part}.weight"] = torch.stack(own)
    return found


def _put(model: MoeModel, name: str, tensor: torch.Tensor) -> None:
    """Give the model in memory the values of a tensor of the file."""
    with torch.no_grad():
        if not name.startswith("blk."):
            block = NAMES.get(model.family, USUAL)[0]
            model.base.get_parameter(name.replace(f".{block}.", ".mlp.")).copy_(tensor)
            return
        _, layer, part, kind = name.split(".")
        experts = model.base.model.layers[int(layer)].mlp.experts
        if model.family == "gpt_oss":
            suffix = "" if kind == "weight" else "_bias"
            stem = "down_proj" if part == PARTS[2] else "gate_up_proj"
            outputs = {PARTS[0]: slice(0, None, 2), PARTS[1]: slice(1, None, 2)}.get(part, slice(None))
            values = tensor.transpose(1, 2) if kind == "weight" else tensor
            experts.get_parameter(f"{stem}{suffix}")[..., outputs].copy_(values)
            return
        size = experts.gate_up_proj.shape[1] // 2
        rows = {PARTS[0]: slice(0, size), PARTS[1]: slice(size, 2 * size)}.get(part)
        (experts.down_proj if rows is None else experts.gate_up_proj[:, rows]).copy_(tensor)


@pytest.mark.parametrize(
    ("family", "kind"),
    mostly_slow_rows(
        [*itertools.product(ARCHITECTURES, ["F32", "Q8_0"]), ("gpt_oss", "MXFP4")],
        *itertools.product(list(ARCHITECTURES)[:2], ["Q8_0"]),
        ("gpt_oss", "MXFP4"),
    ),
)
async def test_a_gguf_file_is_the_model_that_it_was_made_of(family: str, kind: str, tmp_path: Path) -> None:
    model = MoeModel(tmp_path, family, moe_intermediate_size=32, intermediate_size=64, **OVERRIDES[family])
    original = read_spec(model.folder, "native")
    path = write(model, kind)
    ours = read_spec(path)
    same = {name: getattr(original, name) for name in ("packed", "dtype", "eos_token_ids")}
    assert msgspec.structs.replace(ours, **same) == original
    if kind == "F32":
        return
    assert {packing.format for packing in ours.packed.values()} == {"q8_0", kind.lower()}
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    async with engine_of(path, model_impl="native", block_size=16) as engine:
        assert engine.info.batch_invariant, "the compiled step runs it"
        for seed in range(2):
            tokens = prompt(seed, 20)
            output = await engine.complete(tokens, params)
            logits = model.logits([*tokens, *output.token_ids[:-1]], None)[len(tokens) - 1 :]
            assert output.token_ids == logits.argmax(-1).tolist()


def test_a_number_of_experts_that_cannot_be_is_refused(tmp_path: Path) -> None:
    path = write(MoeModel(tmp_path, "olmoe"), "F32", expert_used_count=9)
    with pytest.raises(ConfigError, match="num_experts_per_tok=9: must be <= num_experts=4"):
        read_spec(path)
