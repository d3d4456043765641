"""Tiny random models and adapters on disk, and what transformers and peft make of them.

For every test that needs a real checkpoint. Building takes a fraction of a second; callers keep the
folder for the session. Weights come from a private generator: the same arguments give the same files.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from support.quick_llama import FAMILIES, QuickLlama
from torch import Tensor

CONFIGS: dict[str, type[transformers.PreTrainedConfig]] = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "granite": transformers.GraniteConfig,
    "smollm3": transformers.SmolLM3Config,
    "olmo2": transformers.Olmo2Config,
    "olmo3": transformers.Olmo3Config,
    "phi3": transformers.Phi3Config,
    "gemma": transformers.GemmaConfig,
    "gemma2": transformers.Gemma2Config,
    "gemma3_text": transformers.Gemma3TextConfig,
    "glm4": transformers.Glm4Config,
}

BASE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_WINDOWS = {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_GEMMA = {"head_dim": 32, "tie_word_embeddings": False, **_WINDOWS}
FAMILY: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 12},
    "qwen2": {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
    "qwen3": {"head_dim": 32},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.2,
        "logits_scaling": 1.5,
    },
    "smollm3": {"no_rope_layer_interval": 2},
    "olmo2": {},
    "olmo3": _WINDOWS,
    "phi3": {"partial_rotary_factor": 0.75},
    "gemma": {"head_dim": 32, "tie_word_embeddings": False},
    # Their embeddings are large: with a tied head, a token is followed by itself.
    "gemma2": {"attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 20, **_GEMMA},
    "gemma3_text": {"query_pre_attn_scalar": 20, **_GEMMA},
    "glm4": {"head_dim": 16},
}
ALL_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build_model(
    out_dir: Path,
    family: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    **overrides: Any,
) -> Path:
    """Saves a random model of ``family`` (a key of :data:`CONFIGS`) in ``out_dir`` and returns it.

    ``overrides`` are transformers configuration fields. By default: hidden 64, 3 layers, 4 heads, 2
    KV heads, vocabulary 256, no tokenizer; mistral and qwen2 (its layers 1 and 2) have a sliding
    window of 12, qwen3 a head_dim of 32. ``max_shard_size="50KB"`` gives a sharded checkpoint.
    """
    config = CONFIGS[family](**{**BASE, **FAMILY[family], **overrides})
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Wide enough that greedy outputs wander through the vocabulary with clear margins.
            noise = torch.randn(parameter.shape, generator=generator)
            mean = 1 if "norm" in name and not family.startswith("gemma") else 0  # Gemma's norms add 1
            parameter.copy_(mean + 0.2 * noise)
    model.to(dtype).save_pretrained(out_dir, max_shard_size=max_shard_size)
    return out_dir


def build_adapter(
    model_dir: Path,
    out_dir: Path,
    *,
    seed: int = 0,
    scale: float = 0.15,
    dtype: torch.dtype = torch.float32,
    **lora_config: Any,
) -> Path:
    """Saves a random PEFT LoRA for the model in ``out_dir`` and returns it.

    ``lora_config`` goes to :class:`peft.LoraConfig`; by default r=4, lora_alpha=8, all seven linears.
    Every A and B is non-zero (standard deviation ``scale``), enough to change greedy outputs; DoRA's
    magnitudes differ from the base weight's by a fifth.
    """
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": ALL_MODULES, "task_type": "CAUSAL_LM"}
    base = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(**{**defaults, **lora_config}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:  # DoRA: peft begins with the norms of the base weight's rows
                parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
            elif "lora_" in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
                parameter.data = parameter.data.to(dtype)
    model.save_pretrained(str(out_dir))
    return out_dir


@functools.cache
def reference_model(model_dir: Path, adapter_dir: Path | None = None) -> Any:
    """The model in transformers, float32 and evaluation mode, with the adapter applied by peft."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    if adapter_dir is not None:
        model = PeftModel.from_pretrained(model, adapter_dir)
    return model.eval()


def reference_logits(model_dir: Path, token_ids: Sequence[int], adapter_dir: Path | None = None) -> Tensor:
    """Logits [len(token_ids), vocab] in float32."""
    with torch.no_grad():
        model = reference_model(model_dir, adapter_dir)
        logits: Tensor = model(torch.tensor([list(token_ids)]), use_cache=False).logits[0]
    return logits


def reference_generate(
    model_dir: Path,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    adapter_dir: Path | None = None,
) -> list[int]:
    """The greedy continuation, end-of-sequence tokens ignored. Each token is the reference's: a guess of the
    rest saves most of its passes, not the check (Leviathan et al., Speculative Decoding, 2023)."""
    tokens = list(prompt_ids)
    end, guesses = len(tokens) + max_new_tokens, True
    while len(tokens) < end:
        guess = _guess(model_dir, tokens, end - len(tokens) - 1, adapter_dir) if guesses else []
        greedy = reference_logits(model_dir, tokens + guess, adapter_dir).argmax(-1).tolist()
        true = greedy[len(tokens) - 1 :]
        right = next((i for i, token in enumerate(guess) if token != true[i]), len(guess))
        tokens += true[: right + 1]
        guesses = right == len(guess)  # or it leaves out what this adapter changes
    return tokens[len(prompt_ids) :]


def _guess(model_dir: Path, tokens: Sequence[int], count: int, adapter_dir: Path | None) -> list[int]:
    quick = _quick(model_dir, adapter_dir)
    return [] if quick is None else quick.greedy(tokens, count)


@functools.cache
def _quick(model_dir: Path, adapter_dir: Path | None) -> QuickLlama | None:
    model = reference_model(model_dir, adapter_dir)
    return QuickLlama(model) if model.config.model_type in FAMILIES else None
