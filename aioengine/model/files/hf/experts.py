"""The experts that a ``config.json`` describes. No torch here."""

from __future__ import annotations

from typing import Any

from aioengine.model.experts.spec import ExpertNames
from aioengine.model.files.hf.config_file import ConfigFile, NotNative
from aioengine.model.files.hf.families import Family
from aioengine.model.spec import MAX_EXPERTS

MIXTRAL = ExpertNames(block="block_sparse_moe", gate="w1", up="w3", down="w2")
_COUNTS = ("num_experts", "num_local_experts")
"""Keys for the number of experts; transformers takes either for the other."""


def read_experts(config: ConfigFile, family: Family, num_layers: int) -> dict[str, Any]:
    """Return the fields of :class:`MixtureSpec` that :class:`ModelSpec` does not have; none for a family
    without experts.

    Raises ConfigError for odd values, and NotNative for what is not known.
    """
    if family not in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss"):
        return {}
    method = config.get("quantization_config")
    if method is not None and is_mxfp4(method) != (family == "gpt_oss"):
        supported = "MXFP4, or none" if family == "gpt_oss" else "GPTQ, AWQ, compressed-tensors, FP8, or none"
        raise config.error("quantization_config", method, f"{family} is supported in: {supported}", NotNative)
    if config.get("clip_qkv") is not None:
        raise config.error("clip_qkv", config.get("clip_qkv"), "only null is supported", NotNative)
    key = next((key for key in _COUNTS if key in config.raw), _COUNTS[family in ("mixtral", "gpt_oss")])
    experts, chosen = config.positive(key, most=MAX_EXPERTS), config.positive("num_experts_per_tok")
    if chosen > experts:
        raise config.error("num_experts_per_tok", chosen, f"must be <= {key}={experts}")
    fields: dict[str, Any] = {"experts": experts, "experts_per_token": chosen}
    qwen = family.startswith("qwen")
    fields["expert_size"] = config.positive("moe_intermediate_size" if qwen else "intermediate_size")
    fields["normalized"] = family in ("mixtral", "gpt_oss") or config.flag("norm_topk_prob")
    if family == "mixtral":
        fields["names"] = MIXTRAL
    if family == "gpt_oss":
        fields |= {"biased": True, "interleaved": True, "names": ExpertNames(router="router")}
        fields |= {key: config.number(key) for key in ("swiglu_alpha", "swiglu_limit")}
    if family == "qwen2_moe":
        fields["shared_size"] = config.positive("shared_expert_intermediate_size")
    if qwen:
        fields["dense_layers"] = _dense_layers(config, num_layers)
    return fields


def is_mxfp4(quantization: Any) -> bool:
    """Return whether a ``quantization_config`` says that experts are in MXFP4, and nothing else is."""
    return isinstance(quantization, dict) and quantization.get("quant_method") == "mxfp4"


def _dense_layers(config: ConfigFile, num_layers: int) -> tuple[int, ...]:
    """Return the layers of ``mlp_only_layers``, and all but every ``decoder_sparse_step``-th."""
    listed, step = config.get("mlp_only_layers") or [], config.positive("decoder_sparse_step", default=1)
    if not isinstance(listed, list) or not all(type(layer) is int for layer in listed):
        raise config.error("mlp_only_layers", listed, "must be a list of layers")
    return tuple(layer for layer in range(num_layers) if layer in listed or (layer + 1) % step)
