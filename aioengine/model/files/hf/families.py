"""The native families: the fields of :class:`ModelSpec` by which each differs from Llama whatever its
configuration says, and what an absent key of ``config.json`` means. No torch here."""

from __future__ import annotations

from typing import Any, Literal

from aioengine.model.spec import NormNames

Family = Literal[
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "granite",
    "smollm3",
    "olmo2",
    "olmo3",
    "phi3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm4",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "gpt_oss",
]

_OUTPUT_NORMS = NormNames(
    attention_input=None,
    attention_output="post_attention_layernorm",
    mlp_input=None,
    mlp_output="post_feedforward_layernorm",
)
_GEMMA_NORMS = NormNames(
    attention_output="post_attention_layernorm",
    mlp_input="pre_feedforward_layernorm",
    mlp_output="post_feedforward_layernorm",
)
_GLM_NORMS = NormNames(attention_output="post_self_attn_layernorm", mlp_output="post_mlp_layernorm")

_OLMO: dict[str, Any] = {"norms": _OUTPUT_NORMS, "norm_offset": 0.0, "qk_norm": True, "qk_norm_whole": True}
_GEMMA: dict[str, Any] = {"norm_offset": 1.0, "activation": "gelu_tanh"}

TRAITS: dict[Family, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "granite": {},
    "smollm3": {},
    "olmo2": _OLMO,  # arXiv:2501.00656, section 3.1
    "olmo3": _OLMO,
    "phi3": {"fused_qkv": True, "fused_gate_up": True},
    "gemma": _GEMMA,
    "gemma2": {**_GEMMA, "norms": _GEMMA_NORMS},  # arXiv:2408.00118
    "gemma3_text": {**_GEMMA, "norms": _GEMMA_NORMS, "qk_norm": True},  # arXiv:2503.19786
    "glm4": {"norms": _GLM_NORMS, "fused_gate_up": True, "rotary_neighbours": True},
    "mixtral": {},
    "qwen2_moe": {},
    "qwen3_moe": {"qk_norm": True},
    "olmoe": {"qk_norm": True, "qk_norm_whole": True},  # arXiv:2409.02060
    "gpt_oss": {"norm_offset": 0.0, "activation": "clamped_swiglu", "sinks": True},  # arXiv:2508.10925
}
"""Fields of ModelSpec."""

_BOTH = ("qkv_bias", "o_bias")

BIASES: dict[Family, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            *("llama", "qwen3", "granite", "smollm3", "olmo2", "olmo3"),
            *("qwen3_moe", "olmoe", "gpt_oss"),
        ),
        _BOTH,
    ),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), _BOTH),
    "glm4": ("qkv_bias",),
}
"""Fields of ModelSpec that ``attention_bias`` is for; families that are left out have no such key."""

MLP_BIAS: tuple[Family, ...] = ("llama", "granite", "smollm3")
"""Families that heed ``mlp_bias``."""

_LLAMA_TOKENS = {"bos_token_id": 1, "eos_token_id": 2}
_GEMMA_DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
_OLMO_DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "eos_token_id": 50279}

DEFAULTS: dict[Family, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, **_LLAMA_TOKENS},
    "mistral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        **_LLAMA_TOKENS,
    },
    "qwen2": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "qwen3": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "granite": {"max_position_embeddings": 2048, **_LLAMA_TOKENS},
    "smollm3": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "rope_theta": 2e6,
        "no_rope_layer_interval": 4,
        "tie_word_embeddings": True,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
    "olmo2": _OLMO_DEFAULTS,
    "olmo3": {**_OLMO_DEFAULTS, "rope_theta": 5e5, "sliding_window": 4096, "sliding_window_pattern": 4},
    "phi3": {
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 32000,
    },
    "gemma": {
        "max_position_embeddings": 8192,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 1,
    },
    "gemma2": {
        **_GEMMA_DEFAULTS,
        "max_position_embeddings": 8192,
        "sliding_window_pattern": 2,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {
        **_GEMMA_DEFAULTS,
        "max_position_embeddings": 131072,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "sliding_window_pattern": 6,
    },
    "glm4": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rms_norm_eps": 1.5625e-7,
        "attention_bias": True,
        "partial_rotary_factor": 0.5,
        "eos_token_id": [151329, 151336, 151338],
    },
    "mixtral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        **_LLAMA_TOKENS,
    },
    "qwen2_moe": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 16,
        "sliding_window": 4096,
        "qkv_bias": True,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
    },
    "qwen3_moe": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
    "olmoe": {
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "eos_token_id": 50279,
    },
    "gpt_oss": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "sliding_window": 128,
        "sliding_window_pattern": 2,
        "attention_bias": True,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "torch_dtype": "bfloat16",
    },
}
"""Values of keys that are absent from ``config.json``, as in the family's configuration class of
transformers."""
