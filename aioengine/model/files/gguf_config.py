"""GGUF's metadata as a Hugging Face ``config.json``, and the names of its tensors. No torch here.

What a file does not say is what llama.cpp has for the architecture in its code
(https://github.com/ggml-org/llama.cpp/blob/master/src/llama-model.cpp).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aioengine.errors import ConfigError
from aioengine.model.files.hf.families import FAMILIES
from aioengine.model.spec import SUPPORTED_ARCHITECTURES

Get = Callable[[str], Any]
"""The metadata of a file, by the keys below its architecture's; None for one that it does not have."""

ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "granite": "granite",
    "smollm3": "smollm3",
    "olmo2": "olmo2",
    "phi3": "phi3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "glm4": "glm4",
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
    "olmoe": "olmoe",
    "gpt-oss": "gpt_oss",
}
"""``general.architecture`` -> family. Mistral and Mixtral models are stored as ``llama``, and OLMo 3 as
``olmo2``."""
PERMUTED = ("llama", "granite", "smollm3")
"""Architectures in which the rows of q and k are in another order: neighbours are rotated, not halves."""

_KEYS = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "feed_forward_length": "intermediate_size",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings",
    "rope.freq_base_swa": "rope_local_base_freq",
    "attention.sliding_window": "sliding_window",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "attention.scale": "attention_multiplier",
    "logit_scale": "logits_scaling",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
_ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh"}
_WINDOW_EVERY = {"gemma2": 2, "gemma3_text": 6, "olmo3": 4, "gpt_oss": 2}
_LARGEST_GEMMA = {"gemma2": 46, "gemma3_text": 62}  # layers of those whose scale is by the hidden size


def family_of(arch: str, get: Get) -> str:
    """Return the family of an architecture, of which some depend on experts, and on whether there are
    windows."""
    found = ARCHITECTURES[arch]
    if found == "llama" and get("expert_count"):
        return "mixtral"
    with_windows = {"llama": "mistral", "olmo2": "olmo3"}
    return with_windows.get(found, found) if get("attention.sliding_window") else found


def config_of(arch: str, get: Get, path: Path) -> dict[str, Any]:
    """Return what a ``config.json`` says of the same model, but for what the tensors show. Raises
    ConfigError, naming ``path``, for layers that differ and for unknown rotations."""
    family = family_of(arch, get)
    found: dict[str, Any] = {"model_type": family}
    found["architectures"] = [name for name, own in SUPPORTED_ARCHITECTURES.items() if own == family]
    for key, name in _KEYS.items():
        value = get(key)
        if isinstance(value, list):  # one for each layer
            if len(set(value)) != 1:
                problem = f"{arch}.{key} differs between layers, which is not supported: {value}"
                raise ConfigError(f"{path}: {problem}")
            value = value[0]
        if value is not None and (value or not key.startswith("expert_")):
            found[name] = value
    if "num_experts" in found and FAMILIES[family].experts is None:
        count = found["num_experts"]
        raise ConfigError(f"{path}: expert_count={count}: {family} models with experts are not supported")
    layers, heads = found.get("num_hidden_layers", 0), found.get("num_attention_heads", 1)
    head_dim = found.setdefault("head_dim", found.get("hidden_size", 0) // heads)
    if family in _LARGEST_GEMMA:
        largest = layers == _LARGEST_GEMMA[family]
        found["query_pre_attn_scalar"] = found.get("hidden_size", 0) // heads if largest else head_dim
        found.setdefault("final_logit_softcapping", None)
        found.setdefault("attn_logit_softcapping", None)
    if family == "granite":
        found.setdefault("attention_multiplier", head_dim**-0.5)
    kind = _ACTIVATIONS.get(FAMILIES[family].fields.get("activation", "silu"), "silu")
    found |= {"hidden_act": kind, "rope_theta": get("rope.freq_base") or 10000.0}
    found["rope_scaling"] = _rope_scaling(arch, get, path)
    if FAMILIES[family].experts is not None:
        found["norm_topk_prob"] = family == "qwen3_moe"
        if "moe_intermediate_size" not in FAMILIES[family].absent:
            found["intermediate_size"] = get("expert_feed_forward_length") or found.get("intermediate_size")
    found.setdefault("sliding_window", None)
    if found["sliding_window"] and FAMILIES[family].windows != "never":
        found["use_sliding_window"] = True
        found["layer_types"] = _layer_types(family, get, layers)
    if family == "olmo3":
        found.setdefault("rope_local_base_freq", found["rope_theta"])
    if FAMILIES[family].partial and (rotated := get("rope.dimension_count") or head_dim) != head_dim:
        found["partial_rotary_factor"] = rotated / head_dim
    return found


def _layer_types(family: str, get: Get, layers: int) -> list[str]:
    pattern = get("attention.sliding_window_pattern") or _WINDOW_EVERY.get(family, layers + 1)
    if not isinstance(pattern, list):
        pattern = [(layer + 1) % int(pattern) != 0 for layer in range(layers)]
    return ["sliding_attention" if slides else "full_attention" for slides in pattern]


def _rope_scaling(arch: str, get: Get, path: Path) -> dict[str, Any] | None:
    linear = get("rope.scale_linear") or 1.0
    kind = get("rope.scaling.type") or ("linear" if linear != 1.0 else "none")
    factor = get("rope.scaling.factor") or linear
    match kind:
        case "none":
            return None
        case "linear":
            return {"rope_type": kind, "factor": factor}
        case "yarn":
            # llama.cpp multiplies the paper's attention factor by this one.
            extra = get("rope.scaling.yarn_attn_factor") or get("rope.scaling.attn_factor") or 1.0
            found = {
                "rope_type": kind,
                "factor": factor,
                "original_max_position_embeddings": get("rope.scaling.original_context_length"),
                "beta_fast": get("rope.scaling.yarn_beta_fast"),
                "beta_slow": get("rope.scaling.yarn_beta_slow"),
                "attention_factor": None if extra == 1.0 else extra * (0.1 * math.log(factor) + 1.0),
                "truncate": arch != "gpt-oss",
            }
            return {key: value for key, value in found.items() if value is not None}
    raise ConfigError(
        f"{path}: {arch}.rope.scaling.type={kind!r} is not supported; supported: none, linear, yarn, and "
        "factors as a tensor"
    )
