"""Tiny GGUF files for tests, written as llama.cpp's converter lays them out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf.tensor_mapping import get_tensor_name_map
from tokenizers import Tokenizer

_FAMILIES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def tiny_model(family: str, **overrides: Any) -> Any:
    """A random transformers model of two layers, hidden size 64, with random norms and biases."""
    config_class, model_class = (
        getattr(transformers, f"{_FAMILIES[family]}{kind}") for kind in ("Config", "ForCausalLM")
    )
    fields = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config_class(**fields | overrides)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
    return model


def write_gguf(
    path: Path,
    model: Any,
    arch: str,
    kind: str = "F32",
    *,
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray[Any, Any]] | None = None,
    tokenizer: dict[str, Any] | None = None,
) -> Path:
    """Write ``model`` with its matrices stored as ``kind`` (F32, F16, BF16, Q8_0, ...).

    ``metadata`` adds or replaces keys (written by type), ``tensors`` adds float32 tensors, and
    ``tokenizer`` is passed to :func:`add_tokenizer`.
    """
    writer = gguf_writer(path, model, arch, metadata or {})
    add_tokenizer(writer, tokenizer or {})
    for name, parameter in stored_parameters(model):
        quant = gguf.GGMLQuantizationType[kind if parameter.ndim > 1 else "F32"]
        data = in_order(gguf.quants.quantize(parameter.numpy(), quant), name, arch, model.config)
        writer.add_tensor(name, data, raw_dtype=quant)
    for name, data in (tensors or {}).items():
        writer.add_tensor(name, data)
    finish(writer)
    return path


def gguf_writer(path: Path, model: Any, arch: str, metadata: dict[str, Any]) -> gguf.GGUFWriter:
    """A writer with the metadata of ``model``, some of which may be replaced."""
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    fields: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim if hasattr(config, "head_dim") else 16,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": 10000.0,
    }
    for key, value in ({f"{arch}.{k}": v for k, v in fields.items()} | metadata).items():
        _add(writer, key, value)
    return writer


def add_sizes(writer: gguf.GGUFWriter, config: dict[str, Any], rope_theta: float) -> None:
    """Write what ``config.json`` says of any family."""
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope_theta)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def stored_parameters(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters by their names in the file, without a tied head."""
    arch = gguf.MODEL_ARCH[model.config.model_type.upper()]
    names = get_tensor_name_map(arch, model.config.num_hidden_layers)
    for name, parameter in model.state_dict().items():
        if name != "lm_head.weight" or not model.config.tie_word_embeddings:
            yield names.get_name(name, try_suffixes=(".weight", ".bias")), parameter


def in_order(
    data: np.ndarray[Any, Any], name: str, arch: str, config: transformers.PreTrainedConfig
) -> np.ndarray[Any, Any]:
    """Rows as the file has them."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    part = name.split(".")[-2]
    return interleaved(data, heads[part]) if arch == "llama" and part in heads else data


def write_tokenizer_gguf(path: Path, tokenizer: dict[str, Any]) -> Path:
    """A file with tokenizer metadata and one small tensor only."""
    writer = gguf.GGUFWriter(path, "llama")
    add_tokenizer(writer, tokenizer)
    writer.add_tensor("output_norm.weight", np.ones(32, dtype=np.float32))
    finish(writer)
    return path


def add_tokenizer(writer: gguf.GGUFWriter, fields: dict[str, Any]) -> None:
    """Write ``tokenizer.ggml.<key>`` for each field, and ``tokenizer.chat_template``."""
    for key, value in fields.items():
        name = "tokenizer.chat_template" if key == "chat_template" else f"tokenizer.ggml.{key}"
        _add(writer, name, value)


def bpe_fields(tokenizer: Tokenizer, pre: str) -> dict[str, Any]:
    """The metadata that describes a byte-level BPE tokenizer; its special tokens are control."""
    import json

    model = json.loads(tokenizer.to_str())
    special = {token["id"] for token in model["added_tokens"]}
    size = tokenizer.get_vocab_size()
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": [tokenizer.id_to_token(i) for i in range(size)],
        "token_type": [3 if i in special else 1 for i in range(size)],
        "merges": [" ".join(pair) for pair in model["model"]["merges"]],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "add_bos_token": False,
    }


def interleaved(data: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows 0, d/2, 1, d/2 + 1, ... of each head: rotary pairs become neighbours."""
    half = data.shape[0] // heads // 2
    order = [h * 2 * half + i + p * half for h in range(heads) for i in range(half) for p in (0, 1)]
    return data[order]


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
