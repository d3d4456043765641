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
from support.any_models import randomize
from support.greedy import Greedy
from torch import Tensor

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
    """Saves a random model of ``family`` (a key of :data:`FAMILY`) in ``out_dir`` and returns it.

    ``overrides`` are transformers configuration fields. By default: hidden 64, 3 layers, 4 heads, 2
    KV heads, vocabulary 256, no tokenizer; mistral and qwen2 (its layers 1 and 2) have a sliding
    window of 12, qwen3 a head_dim of 32. ``max_shard_size="50KB"`` gives a sharded checkpoint.
    """
    config = transformers.AutoConfig.for_model(family, **{**BASE, **FAMILY[family], **overrides})
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    norms = 0 if family.startswith("gemma") else 1  # Gemma adds 1 to them
    randomize(model, seed, norms).to(dtype).save_pretrained(out_dir, max_shard_size=max_shard_size)
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


@functools.cache
def reference_likeliest(
    model_dir: Path, token_ids: tuple[int, ...], adapter_dir: Path | None = None
) -> list[int]:
    """The likeliest token after each of these."""
    found: list[int] = reference_logits(model_dir, token_ids, adapter_dir).argmax(-1).tolist()
    return found


def reference_generate(
    model_dir: Path, prompt_ids: Sequence[int], max_new_tokens: int, adapter_dir: Path | None = None
) -> Greedy:
    """The greedy continuation, end-of-sequence tokens ignored."""
    model = functools.partial(reference_likeliest, model_dir, adapter_dir=adapter_dir)
    return Greedy(model, prompt_ids, max_new_tokens)
