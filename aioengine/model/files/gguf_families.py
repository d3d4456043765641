"""The architectures of GGUF files: their metadata, and how their tensors differ from Hugging Face's.

What a file does not say is what llama.cpp has for the architecture in its code
(https://github.com/ggml-org/llama.cpp/blob/master/src/llama-model.cpp).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from aioengine.errors import ConfigError
from aioengine.model.experts.spec import ExpertNames
from aioengine.model.files.hf.experts import MIXTRAL
from aioengine.model.files.hf.families import TRAITS, Family
from aioengine.model.spec import RopeSpec

Get = Callable[[str, Any], Any]
"""The metadata of a file, by the keys below its architecture's: ``get(key, default)``."""


class Architecture(NamedTuple):
    """A ``general.architecture``."""

    family: Family
    permuted: bool = False
    """Whether the rows of q and k are in another order: neighbours are rotated, not halves."""
    partial: bool = False
    """Whether heads may be rotated in part."""


ARCHITECTURES = {
    "llama": Architecture("llama", permuted=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "granite": Architecture("granite", permuted=True),
    "smollm3": Architecture("smollm3", permuted=True),
    "olmo2": Architecture("olmo2"),
    "phi3": Architecture("phi3", partial=True),
    "gemma": Architecture("gemma"),
    "gemma2": Architecture("gemma2"),
    "gemma3": Architecture("gemma3_text"),
    "glm4": Architecture("glm4", partial=True),
    "qwen2moe": Architecture("qwen2_moe"),
    "qwen3moe": Architecture("qwen3_moe"),
    "olmoe": Architecture("olmoe"),
    "gpt-oss": Architecture("gpt_oss"),
}
"""Mistral and Mixtral models are stored as ``llama``, and OLMo 3 as ``olmo2``."""

EXPERTS = re.compile(r"blk\.(\d{1,6})\.ffn_(gate|up|down)_exps\.(weight|bias)", re.ASCII)
"""Names of the tensors [experts, out, in] and [experts, out] of a layer's experts."""
SINKS = re.compile(r"blk\.(\d{1,6})\.attn_sinks\.weight", re.ASCII)
ROW = "ffn_gate_inp_shexp"
"""Linear with one output, of which files have the weight as a vector."""
_MIXTURES: dict[Family, dict[str, Any]] = {
    "mixtral": {"normalized": True, "names": MIXTRAL},
    "qwen2_moe": {"normalized": False},
    "qwen3_moe": {"normalized": True},
    "olmoe": {"normalized": False},
    "gpt_oss": {
        "normalized": True,
        "names": ExpertNames(router="router"),
        "biased": True,
        "interleaved": True,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
    },
}

_ROUTER = "ffn_gate_inp"
_IN_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    ROW: "mlp.shared_expert_gate",
}
_WITHOUT_ROPE = 4  # every fourth layer of SmolLM3
_LARGEST_GEMMA = {"gemma2": 46, "gemma3_text": 62}  # layers of those whose scale is by the hidden size


def module_names(family: Family) -> dict[str, str]:
    """Return the modules of a layer: their GGUF names, and those that Hugging Face has."""
    traits = TRAITS[family]
    names = {**_IN_LAYER, "ffn_up": "mlp.gate_up_proj" if traits.get("fused_gate_up") else "mlp.up_proj"}
    if family in _MIXTURES:
        experts = _MIXTURES[family].get("names", ExpertNames())
        names[_ROUTER] = f"{experts.block}.{experts.router}"
    norms = traits.get("norms")
    if norms is None:
        before_mlp = "post_attention_norm" if family == "gpt_oss" else "ffn_norm"
        return names | {"attn_norm": "input_layernorm", before_mlp: "post_attention_layernorm"}
    by_place = {
        "attn_norm": norms.attention_input,
        "post_attention_norm": norms.attention_output,
        "ffn_norm": norms.mlp_input,
        "post_ffw_norm": norms.mlp_output,
    }
    return names | {name: ours for name, ours in by_place.items() if ours is not None}


def family_of(arch: str, get: Get) -> Family:
    """Return the family of an architecture, of which some depend on whether there are windows."""
    found = ARCHITECTURES[arch].family
    if found == "llama" and get("expert_count", 0):
        return "mixtral"
    if get("attention.sliding_window", 0):
        with_windows: dict[Family, Family] = {"llama": "mistral", "olmo2": "olmo3"}
        return with_windows.get(found, found)
    return found


def windows(family: Family, get: Get, layers: int, path: Path) -> tuple[int | None, ...]:
    """Return the window of each layer; empty if no layer has one. Raises ConfigError, naming ``path``."""
    window = int(get("attention.sliding_window", 0) or 0)
    if not window:
        return ()
    every = {"gemma2": 2, "gemma3_text": 6, "olmo3": 4, "gpt_oss": 2}.get(family)
    pattern = get("attention.sliding_window_pattern", every)
    if pattern is None:
        return (window,) * layers
    if not isinstance(pattern, list):
        pattern = [(layer + 1) % int(pattern) != 0 for layer in range(layers)]
    if len(pattern) != layers:
        raise ConfigError(
            f"{path}: attention.sliding_window_pattern has {len(pattern)} entries for {layers} layers"
        )
    return tuple(window if slides else None for slides in pattern)


def fields(
    family: Family, get: Get, *, hidden: int, heads: int, head_dim: int, layers: int
) -> dict[str, Any]:
    """Return what the family has beside Llama's shape, as fields of ModelSpec; without rotations and
    windows."""
    found = dict(TRAITS[family])
    if family == "granite":
        found |= {
            "embedding_scale": float(get("embedding_scale", 1.0)),
            "residual_scale": float(get("residual_scale", 1.0)),
            "attention_scale": float(get("attention.scale", head_dim**-0.5)),
            "logit_divisor": float(get("logit_scale", 1.0)),
        }
    if family.startswith("gemma"):
        found |= {"norm_offset": 0.0, "embedding_scale": hidden**0.5}  # their norms' weights have the 1
    if family in _LARGEST_GEMMA:
        size = hidden // heads if layers == _LARGEST_GEMMA[family] else head_dim
        found |= {"attention_scale": size**-0.5, "logit_cap": get("final_logit_softcapping", None)}
    if family == "gemma2":
        found["attention_cap"] = get("attn_logit_softcapping", None)
    return found


def expert_fields(family: Family, get: Get, path: Path) -> dict[str, Any]:
    """Return the fields that :class:`MixtureSpec` has beside those of ModelSpec; none for a model without
    experts. Raises ConfigError, naming ``path``, for what is not supported."""
    count, chosen = int(get("expert_count", 0) or 0), int(get("expert_used_count", 0) or 0)
    if family not in _MIXTURES:
        if count:
            raise ConfigError(f"{path}: expert_count={count}: {family} models with experts are not supported")
        return {}
    if not 1 <= chosen <= count:
        raise ConfigError(f"{path}: expert_used_count={chosen}: must be from 1 to expert_count={count}")
    size = int(get("expert_feed_forward_length", get("feed_forward_length", 0)))
    return {
        **_MIXTURES[family],
        "experts": count,
        "experts_per_token": chosen,
        "expert_size": size,
        "shared_size": int(get("expert_shared_feed_forward_length", 0)) if family == "qwen2_moe" else 0,
    }


def other_rope(
    family: Family, get: Get, rope: RopeSpec, of_layer: tuple[int | None, ...], layers: int
) -> tuple[RopeSpec | None, tuple[int, ...]]:
    """Return the rotation of some layers that have one of their own, and these layers."""
    if family == "smollm3":
        last = _WITHOUT_ROPE - 1
        return RopeSpec(type="none"), tuple(i for i in range(layers) if i % _WITHOUT_ROPE == last)
    if family not in ("gemma3_text", "olmo3"):
        return None, ()
    theta = float(get("rope.freq_base_swa", 10000.0 if family == "gemma3_text" else rope.theta))
    other, sliding = RopeSpec(theta=theta), tuple(i for i in range(layers) if of_layer and of_layer[i])
    return (other, sliding) if sliding and other != rope else (None, ())
