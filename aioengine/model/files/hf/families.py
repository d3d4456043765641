"""The native families, as data: how each differs from Llama. No torch here."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from aioengine.model.experts.spec import ExpertNames
from aioengine.model.spec import NormNames

_BOTH = ("qkv_bias", "o_bias")


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """What all models of a family have, whatever their configurations say."""

    fields: dict[str, Any] = {}
    """Fields of ModelSpec."""
    absent: dict[str, Any] = {}
    """Values of keys that its checkpoints may leave out, as in its configuration class in transformers."""
    numbers: dict[str, str] = {}
    """Fields of ModelSpec and the keys that they are, where the configuration has these."""
    biases: tuple[str, ...] = _BOTH
    """Fields of ModelSpec that ``attention_bias`` is for; none where there is no such key."""
    windows: Literal["never", "always", "asked", "from_layer"] = "never"
    """Whether ``sliding_window`` holds: always, or only with ``use_sliding_window``, then in the layers of
    ``layer_types``; "from_layer": or else in those from ``max_window_layers`` on."""
    partial: bool = False
    """Whether ``partial_rotary_factor`` is heeded."""
    local_theta: float | None = None
    """Base of the rotation of layers with a window, where these have one of their own."""
    experts: dict[str, Any] | None = None
    """Fields of MixtureSpec; None: there are no experts."""


_OLMO: dict[str, Any] = {
    "norms": NormNames(
        attention_input=None,
        attention_output="post_attention_layernorm",
        mlp_input=None,
        mlp_output="post_feedforward_layernorm",
    ),
    "norm_offset": 0.0,
    "qk_norm": True,
    "qk_norm_whole": True,
}
_GEMMA: dict[str, Any] = {"norm_offset": 1.0, "activation": "gelu_tanh"}
_GEMMA_NORMS = NormNames(
    attention_output="post_attention_layernorm",
    mlp_input="pre_feedforward_layernorm",
    mlp_output="post_feedforward_layernorm",
)
_GLM_NORMS = NormNames(attention_output="post_self_attn_layernorm", mlp_output="post_mlp_layernorm")
_LLAMA_TOKENS = {"bos_token_id": 1, "eos_token_id": 2}
_GEMMA_ABSENT = {"tie_word_embeddings": True, "bos_token_id": 2, "eos_token_id": 1}

FAMILIES = {
    "llama": Family(absent=_LLAMA_TOKENS),
    "mistral": Family(absent={"sliding_window": 4096, **_LLAMA_TOKENS}, biases=(), windows="always"),
    "qwen2": Family(fields={"qkv_bias": True}, biases=(), windows="from_layer"),
    "qwen3": Family(fields={"qk_norm": True}, windows="from_layer"),
    "granite": Family(  # after muP: Yang et al., 2022, arXiv:2203.03466
        absent={"attention_multiplier": 1.0, **_LLAMA_TOKENS},
        numbers={
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "attention_scale": "attention_multiplier",
            "logit_divisor": "logits_scaling",
        },
    ),
    "smollm3": Family(
        absent={
            "rope_theta": 2e6,
            "no_rope_layer_interval": 4,
            "tie_word_embeddings": True,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
        },
        windows="asked",
    ),
    "olmo2": Family(fields=_OLMO, absent={"eos_token_id": 50279}),  # arXiv:2501.00656, section 3.1
    "olmo3": Family(
        fields=_OLMO,
        absent={
            "rope_theta": 5e5,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
            "eos_token_id": 50279,
        },
        windows="always",
        local_theta=5e5,
    ),
    "phi3": Family(
        fields={"fused_qkv": True, "fused_gate_up": True},
        absent={"bos_token_id": 1, "eos_token_id": 32000},
        biases=(),
        windows="always",
        partial=True,
    ),
    "gemma": Family(fields=_GEMMA, absent=_GEMMA_ABSENT),
    "gemma2": Family(  # arXiv:2408.00118
        fields={**_GEMMA, "norms": _GEMMA_NORMS},
        absent={
            **_GEMMA_ABSENT,
            "sliding_window": 4096,
            "sliding_window_pattern": 2,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        numbers={"logit_cap": "final_logit_softcapping", "attention_cap": "attn_logit_softcapping"},
        windows="always",
    ),
    "gemma3_text": Family(  # arXiv:2503.19786
        fields={**_GEMMA, "norms": _GEMMA_NORMS, "qk_norm": True},
        absent={**_GEMMA_ABSENT, "rope_theta": 1e6, "sliding_window": 4096, "sliding_window_pattern": 6},
        numbers={"logit_cap": "final_logit_softcapping"},
        windows="always",
        local_theta=1e4,
    ),
    "glm4": Family(
        fields={"norms": _GLM_NORMS, "fused_gate_up": True, "rotary_neighbours": True},
        absent={"partial_rotary_factor": 0.5, "eos_token_id": [151329, 151336, 151338]},
        biases=("qkv_bias",),
        partial=True,
    ),
    "mixtral": Family(
        absent={"rope_theta": 1e6, **_LLAMA_TOKENS},
        biases=(),
        windows="always",
        experts={
            "names": ExpertNames(block="block_sparse_moe", gate="w1", up="w3", down="w2"),
            "normalized": True,
        },
    ),
    "qwen2_moe": Family(
        absent={
            "qkv_bias": True,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
        },
        biases=(),
        windows="asked",
        experts={},
    ),
    "qwen3_moe": Family(
        fields={"qk_norm": True}, absent={"moe_intermediate_size": 768}, windows="asked", experts={}
    ),
    "olmoe": Family(  # arXiv:2409.02060
        fields={"qk_norm": True, "qk_norm_whole": True}, absent={"eos_token_id": 50279}, experts={}
    ),
    "gpt_oss": Family(  # arXiv:2508.10925
        fields={"norm_offset": 0.0, "activation": "clamped_swiglu", "sinks": True},
        absent={
            "rope_theta": 150000.0,
            "sliding_window": 128,
            "sliding_window_pattern": 2,
            "swiglu_alpha": 1.702,
            "swiglu_limit": 7.0,
            "torch_dtype": "bfloat16",
        },
        numbers={"swiglu_alpha": "swiglu_alpha", "swiglu_limit": "swiglu_limit"},
        windows="always",
        experts={
            "names": ExpertNames(router="router"),
            "normalized": True,
            "biased": True,
            "interleaved": True,
        },
    ),
}
