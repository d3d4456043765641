"""Tiny random models of many of transformers' families, and what transformers and peft make of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
OLD: dict[str, Any] = {
    "vocab_size": 128,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "v_head_dim": 8}
LATENT |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4}
"""Attention whose keys and values come from few numbers."""
MIXED = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": OLD,
    "gpt_neox": COMMON,
    "gptj": {**OLD, "rotary_dim": 4},
    "falcon": {**COMMON, "alibi": True, "multi_query": False},
    "bloom": {**COMMON, "n_head": 4, "n_layer": 2},
    "mpt": {"vocab_size": 128, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},
    "opt": {**COMMON, "ffn_dim": 48, "word_embed_proj_dim": 16},
    "phi": COMMON,
    "phi3": COMMON,
    "stablelm": COMMON,
    "starcoder2": {**COMMON, "sliding_window": 6},
    "gemma": {**COMMON, "head_dim": 16},
    "gemma2": {**COMMON, "head_dim": 16, "sliding_window": 6, "attn_logit_softcapping": 2.0},
    "gemma3_text": {**COMMON, "head_dim": 16, **MIXED},
    "granite": {**COMMON, "attention_multiplier": 0.2, "logits_scaling": 3.0, "residual_multiplier": 0.7},
    "granitemoe": {**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo": COMMON,
    "olmo2": COMMON,
    "olmo3": {**COMMON, **MIXED},
    "olmoe": {**COMMON, "num_experts": 4, "num_experts_per_tok": 2},
    "smollm3": {**COMMON, "no_rope_layer_interval": 2},
    "cohere": {**COMMON, "logit_scale": 0.5},
    "cohere2": {**COMMON, **MIXED},
    "glm4": {**COMMON, "head_dim": 8},
    "exaone4": {**COMMON, **MIXED},
    "nemotron": COMMON,
    "mixtral": {**COMMON, "num_local_experts": 4},
    "qwen2_moe": {**COMMON, **EXPERTS, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {**COMMON, **EXPERTS, "head_dim": 8},
    "gpt_oss": {**COMMON, **MIXED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        **COMMON,
        **LATENT,
        "moe_intermediate_size": 24,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    # Of the same kinds, but in no list of ours. The first two choose by values how to go on.
    "jetmoe": {**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8},
    "longcat_flash": {
        **{key: value for key, value in COMMON.items() if key != "num_hidden_layers"},
        **LATENT,
        "num_layers": 2,
        "head_dim": 4,
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 24,
        "n_routed_experts": 4,
        "zero_expert_num": 2,
        "moe_topk": 2,
    },
    # Of a hybrid class, but without layers that are not attention.
    "granitemoehybrid": {
        **COMMON,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 24,
        "position_embedding_type": "rope",
        "layer_types": ["full_attention", "full_attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
    },
    "llama4_text": {**COMMON, "head_dim": 8, "num_local_experts": 2, "attention_chunk_size": 8},
    "gpt_neo": {
        "vocab_size": 128,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "window_size": 6,
        "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": 128,
    },
    "diffllama": COMMON,
}


WITHOUT_EFFECT = {"longcat_flash": ["classifier"], "llama4_text": ["router"]}
"""What "all-linear" means, too, but peft cannot run, or runs without the adapter."""


def config_of(family: str, **overrides: Any) -> Any:
    return transformers.AutoConfig.for_model(family, **{**FAMILIES.get(family, COMMON), **overrides})


def randomize(model: Any, seed: int = 0, norms: int = 1) -> Any:
    """Weights from a generator of their own, wide enough that greedy outputs wander with clear margins; those
    of norms are about ``norms``."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            norm = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(norms + 0.2 * noise if norm else 0.2 * noise)
    return model.eval()


def is_linear(module: Any) -> bool:
    return isinstance(module, (torch.nn.Linear, transformers.pytorch_utils.Conv1D))


@dataclasses.dataclass
class AnyModel:
    """A model on disk with two adapters, and the same in memory."""

    folder: Path
    adapters: dict[str, Path]
    reference: Any
    """A PeftModel with both adapters."""

    def logits(self, tokens: Sequence[int], adapter: str | None) -> Tensor:
        """[len(tokens), vocab], in one pass."""
        ids = torch.tensor([list(tokens)])
        with torch.no_grad():
            if adapter is None:
                with self.reference.disable_adapter():
                    return self.reference(input_ids=ids, use_cache=False).logits[0]
            self.reference.set_adapter(adapter)
            return self.reference(input_ids=ids, use_cache=False).logits[0]


def build_any(root: Path, family: str, **overrides: Any) -> AnyModel:
    """A model of ``family`` with the adapters "plain", on two kinds of linears, and peft's own "all-linear",
    which are experts and routers, too, in models in which these once were linears."""
    model = randomize(transformers.AutoModelForCausalLM.from_config(config_of(family, **overrides)))
    model.save_pretrained(root / "model")
    linears = [name for name, module in model.named_modules() if is_linear(module)]
    names = [name for name in linears if ".1." in name]
    beside = [name for name in names if name.rpartition(".")[0] == names[0].rpartition(".")[0]]
    targets = {
        "plain": [name.rpartition(".")[2] for name in (names[0], beside[-1])],
        "all-linear": "all-linear",
    }
    conv = any(isinstance(m, transformers.pytorch_utils.Conv1D) for m in model.modules())
    adapters = {}
    peft: Any = None
    for seed, (name, modules) in enumerate(targets.items()):
        config = LoraConfig(
            r=4, lora_alpha=8, target_modules=modules, fan_in_fan_out=conv,
            exclude_modules=WITHOUT_EFFECT.get(family),
        )  # fmt: skip
        if peft is None:
            peft = get_peft_model(model, config, adapter_name=name)
        else:
            peft.add_adapter(name, config)
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in peft.named_parameters():
            if "lora_" in key and f".{name}." in key:
                parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
        peft.save_pretrained(str(root), selected_adapters=[name])
        adapters[name] = root / name
    assert isinstance(peft, PeftModel)
    return AnyModel(root / "model", adapters, peft.eval())
