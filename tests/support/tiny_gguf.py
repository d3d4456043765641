"""Tiny GGUF files for tests, written as llama.cpp's converter lays them out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf.constants import GGML_QUANT_SIZES
from gguf.tensor_mapping import get_tensor_name_map
from support.any_models import randomize
from tokenizers import Tokenizer


def tiny_model(family: str, **overrides: Any) -> Any:
    """A random transformers model of two layers, hidden size 64."""
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
    config = transformers.AutoConfig.for_model(family, **fields | overrides)
    return randomize(transformers.AutoModelForCausalLM.from_config(config))


PERMUTED = ("llama", "granite", "smollm3")
"""Architectures whose q and k have rotary pairs as neighbours."""
FIELDS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_used_count": "num_experts_per_tok",
}
"""A file's metadata -> its name in ``config.json``."""
OF_EXPERTS = {
    "qwen2moe": {
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    },
    "qwen3moe": {"expert_feed_forward_length": "moe_intermediate_size"},
}
"""The same, of some architectures alone."""


ENDS = {"tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1}
"""Metadata of a file without a tokenizer."""


def described(arch: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a ``config.json`` says, as a file's metadata; zero and null are left out."""
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    config = {**config, "head_dim": config.get("head_dim") or head_dim}
    if not config.get("use_sliding_window", True):
        config["sliding_window"] = None
    found = {key: config.get(name) for key, name in (FIELDS | OF_EXPERTS.get(arch, {})).items()}
    found["expert_count"] = config.get("num_local_experts") or config.get("num_experts")
    rope = config.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    found["rope.freq_base"] = float(rope.get("rope_theta", 10000.0))
    if (rotated := rope.get("partial_rotary_factor", 1.0)) != 1.0:
        found["rope.dimension_count"] = int(config["head_dim"] * rotated)
    if rope.get("rope_type") == "yarn":
        found["rope.scaling.type"] = "yarn"
        found["rope.scaling.factor"] = rope["factor"]
        found["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    return {f"{arch}.{key}": value for key, value in found.items() if value}


class ModelWriter(gguf.GGUFWriter):
    """Writes a model that has this ``config.json``; ``metadata`` adds or replaces keys."""

    def __init__(
        self, path: Path, arch: str, config: Mapping[str, Any], metadata: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(path, arch)
        heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
        self._heads = heads if arch in PERMUTED else {}
        for key, value in (described(arch, config) | dict(metadata or {})).items():
            put(self, key, value)

    def store(self, name: str, tensor: torch.Tensor, kind: str) -> None:
        """Store a tensor as F32, Q8_0, ..., and give it the values that are stored."""
        quant = gguf.GGMLQuantizationType[kind]
        try:
            raw = gguf.quants.quantize(tensor.numpy(), quant)
        except NotImplementedError:
            raw = random_blocks(kind, *tensor.shape, seed=len(self.tensors[0]))
        values = gguf.quants.dequantize(raw, quant).reshape(tensor.shape)
        tensor.copy_(torch.from_numpy(values.copy()))
        heads = self._heads.get(name.split(".")[-2], 0)
        self.add_tensor(name, interleaved(raw, heads) if heads else raw, raw_dtype=quant)


def random_blocks(kind: str, n: int, k: int, *, seed: int) -> np.ndarray[Any, Any]:
    """Any codes of a type that the gguf package cannot make, with scales that make weights of about 0.2."""
    rng = np.random.default_rng(seed)
    size, nbytes = GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    raw = rng.integers(0, 256, (n, k // size, nbytes), dtype=np.uint8)
    where, largest = {
        "Q2_K": ((80, 82), 15 * 2),
        "Q3_K": ((108,), 32 * 4),
        "Q4_K": ((0, 2), 63 * 10),
        "Q5_K": ((0, 2), 63 * 20),
        "Q6_K": ((208,), 100 * 32),
    }[kind]
    for at in where:
        scale = rng.uniform(0.2, 0.5, (n, k // size, 1)) / largest
        raw[:, :, at : at + 2] = scale.astype(np.float16).view(np.uint8)
    return raw.reshape(n, -1)


def write_gguf(
    path: Path,
    model: Any,
    arch: str,
    kind: str | Callable[[str], str] = "F32",
    *,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray[Any, Any]] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``model``, whose matrices get the values that they have when they are stored as ``kind`` (or what
    it says for a name in the file), without a tied head.

    ``metadata`` adds or replaces keys, ``tensors`` adds float32 tensors, and ``tokenizer`` is passed to
    :func:`add_tokenizer`.
    """
    writer = ModelWriter(path, arch, model.config.to_dict(), metadata)
    add_tokenizer(writer, tokenizer or {})
    names = get_tensor_name_map(
        gguf.MODEL_ARCH[model.config.model_type.upper()], model.config.num_hidden_layers
    )
    for name, parameter in model.state_dict().items():
        if name != "lm_head.weight" or not model.config.tie_word_embeddings:
            stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
            own = kind if isinstance(kind, str) else kind(stored)
            writer.store(stored, parameter, own if parameter.ndim > 1 else "F32")
    for name, data in (tensors or {}).items():
        writer.add_tensor(name, data)
    finish(writer)
    return path


def write_tokenizer_gguf(path: Path, tokenizer: dict[str, Any]) -> Path:
    """A file with tokenizer metadata and one small tensor only."""
    writer = gguf.GGUFWriter(path, "llama")
    add_tokenizer(writer, tokenizer)
    writer.add_tensor("output_norm.weight", np.ones(32, dtype=np.float32))
    finish(writer)
    return path


def add_tokenizer(writer: gguf.GGUFWriter, fields: Mapping[str, Any]) -> None:
    """Write ``tokenizer.ggml.<key>`` for each field, and ``tokenizer.chat_template``."""
    for key, value in fields.items():
        name = "tokenizer.chat_template" if key == "chat_template" else f"tokenizer.ggml.{key}"
        put(writer, name, value)


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


def put(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Write metadata by its type."""
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
