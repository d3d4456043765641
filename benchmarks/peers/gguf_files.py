"""The embedded model and PEFT adapters as GGUF files, in the layout that llama.cpp reads."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file

from aioengine.model.files.resolve import read_spec

_NAMES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


def write_bfloat16(source: Path, target: Path) -> Path:
    """Write the GGUF file ``source`` with all its matrices in bfloat16; returns ``target``."""
    reader = gguf.GGUFReader(str(source))
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        element = field.types[1] if field.types[0] is gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=element)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values)
        else:
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(tensor.name, gguf.quantize(values, kind), raw_dtype=kind)
    return _close(writer, target)


def write_adapter(folder: Path, model: Path, target: Path) -> Path:
    """Write the PEFT adapter in ``folder`` for a Llama ``model`` (its folder); returns ``target``."""
    spec = read_spec(model)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", config["lora_alpha"])
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        # base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight
        parts = key.split(".")
        layer, module, side = parts[4], parts[-3], parts[-2]
        values = tensor.to(torch.float32).numpy()
        if side == "lora_B" and module in ("q_proj", "k_proj"):
            values = _interleaved(values, spec.num_heads if module == "q_proj" else spec.num_kv_heads)
        writer.add_tensor(f"blk.{layer}.{_NAMES[module]}.weight.{side.lower()}", values)
    return _close(writer, target)


def _interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """The rows of q or k in the order of llama.cpp's rotary embedding, which turns neighbours."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, rows.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))


def _close(writer: gguf.GGUFWriter, target: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
