"""What is wrong with a quantized checkpoint is said: which setting or tensor, and what would do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.plain_decoder import plain_decoder
from support.quantized_checkpoints import Quantize, awq, float8, gptq, pack_quantized, write_quantized

from aioengine.errors import ConfigError
from aioengine.model.files.resolve import read_spec
from aioengine.model.files.weights import load_weights

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
FP8 = {"quant_method": "fp8"}
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
PACKED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"weights": WEIGHTS, "targets": ["Linear"]}},
}
ORDERED = {**GPTQ, "desc_act": True}
Q0 = "model.layers.0.self_attn.q_proj"
SCALE = f"{Q0}.weight_scale"


def load(model: Path) -> None:
    decoder = plain_decoder(read_spec(model), torch.float32)
    load_weights(decoder, model)


def folder(root: Path, quantize: Quantize, config: dict[str, Any]) -> Path:
    return write_quantized(root, quantize, config, num_hidden_layers=1).packed


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes.*GPTQ, AWQ or GGUF"),
        ({"quant_method": "hqq"}, "quant_method='hqq': not supported; supported: gptq, awq"),
        ("int4", "quant_method=None"),
        ({**GPTQ, "bits": 3}, "quant_method='gptq': bits=3: 4 and 8"),
        ({**GPTQ, "group_size": 12}, "groups of 12 inputs"),
        ({**GPTQ, "group_size": 128}, "groups of 128 inputs, of 96"),
        ({**GPTQ, "group_size": 16}, r"down_proj.qzeros: expected shape \(6, 8\) of I32, found \(3, 8\)"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format='marlin': supported: gptq, gptq_v2"),
        ({**GPTQ, "dynamic": {"-:lm_head": {}, "+:.*": {"bits": 8}}}, "dynamic"),
        ({**AWQ, "version": "gemv"}, "version='gemv': only 'gemm'"),
        (AWQ, r"down_proj.weight: groups of 32 inputs, of 12"),
        ({**PACKED, "config_groups": {}}, "config_groups"),
        ({**PACKED, "format": "marlin-24"}, "format='marlin-24': supported: pack-quantized"),
        (
            {**PACKED, "config_groups": {"g": {"weights": {**WEIGHTS, "type": "float"}}}},
            "4 bits of float.*supported: 4 or 8 bits of int",
        ),
        ({**FP8, "weight_block_size": [128]}, "weight_block_size=.*two numbers"),
        ({**FP8, "fmt": "e5m2"}, "fmt='e5m2': only e4m3"),
    ],
)
def test_settings(config: Any, message: str, tmp_path: Path) -> None:
    """Those of a GPTQ checkpoint are replaced."""
    model = folder(tmp_path, gptq(), GPTQ)
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "quantization_config": config}))
    with pytest.raises(ConfigError, match=message):
        load(model)


def with_words(tensors: dict[str, torch.Tensor], words: torch.Tensor) -> None:
    tensors[f"{Q0}.qweight"] = words


@pytest.mark.parametrize(
    ("quantize", "config", "change", "message"),
    [
        (gptq(), GPTQ, lambda t: t.pop(f"{Q0}.scales"), f"{Q0}.scales: is missing"),
        (gptq(), GPTQ, lambda t: with_words(t, t[f"{Q0}.qweight"].short()), "of I32, found .* of I16"),
        (gptq(), GPTQ, lambda t: with_words(t, t[f"{Q0}.qweight"].flatten()), "expected a matrix"),
        (gptq(), GPTQ, lambda t: t[f"{Q0}.g_idx"].sub_(1).neg_(), "not neighbours"),
        (gptq(ordered=True), ORDERED, lambda t: t[f"{Q0}.g_idx"].fill_(7), "groups that do not exist"),
        (
            gptq(),
            GPTQ,
            lambda t: with_words(t, torch.zeros(8, 128).int()),
            r"qzeros: expected shape \(2, 16\)",
        ),
        (awq(), AWQ, lambda t: t[f"{Q0}.scales"].fill_(float("nan")), "scale.*not finite"),
        (float8(), FP8, lambda t: t[f"{Q0}.weight"].view(torch.uint8).fill_(127), "weight: is not finite"),
        (float8(), FP8, lambda t: t.update({SCALE: torch.ones(4, 4)}), r"weight_scale: has shape \(4, 4\)"),
        (pack_quantized(), PACKED, lambda t: t.pop(SCALE), "weight_scale: is missing"),
        (
            pack_quantized(),
            PACKED,
            lambda t: t.update({f"{Q0}.weight_g_idx": torch.zeros(4)}),
            "not neighbours are not supported",
        ),
    ],
)
def test_tensors(
    quantize: Quantize,
    config: dict[str, Any],
    change: Callable[[dict[str, torch.Tensor]], Any],
    message: str,
    tmp_path: Path,
) -> None:
    model = folder(tmp_path, quantize, config)
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=message):
        load(model)


def test_tensors_of_a_linear_may_be_in_several_files(tmp_path: Path) -> None:
    model = folder(tmp_path, awq(), AWQ)
    tensors = load_file(model / "model.safetensors")
    parts = {f"model-{i}.safetensors": dict(sorted(tensors.items())[i::3]) for i in range(3)}
    for name, part in parts.items():
        save_file(part, model / name, metadata={"format": "pt"})
    index = {"weight_map": {key: name for name, part in parts.items() for key in part}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    whole = folder(tmp_path / "whole", awq(), AWQ)
    decoders = []
    for path in (model, whole):
        decoder = plain_decoder(read_spec(path), torch.float32)
        load_weights(decoder, path)
        decoders.append(decoder.layers[0].linears["qkv"].weight)
    assert torch.equal(decoders[0].rows(0, 128), decoders[1].rows(0, 128))
