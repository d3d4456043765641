"""Adapters with trained tokens: rows of the embeddings and of the head that PEFT replaces."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import build_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def build_trained(
    model: Path,
    folder: Path,
    *,
    seed: int = 0,
    scale: float = 0.2,
    rows: Sequence[int] = (),
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """Save a random adapter whose trained rows are random, too. Of whole matrices in ``modules_to_save`` only
    ``rows`` are changed."""
    build_adapter(model, folder, seed=seed, dtype=dtype, **config)
    tensors = load_file(folder / WEIGHTS)
    generator = torch.Generator().manual_seed(seed)
    changed: dict[tuple[int, ...], torch.Tensor] = {}
    for key in sorted(tensors):
        tensor = tensors[key]
        if key.endswith("trainable_tokens_delta"):
            tensor = tensor + scale * torch.randn(tensor.shape, generator=generator)
        elif key.endswith((".embed_tokens.weight", ".lm_head.weight")):
            tensor = tensor.clone()
            noise = scale * torch.randn(len(rows), tensor.shape[1], generator=generator)
            if config.get("ensure_weight_tying"):
                noise = changed.setdefault(tuple(rows), noise)
            tensor[list(rows)] += noise
        tensors[key] = tensor.to(dtype) if "lora_" in key else tensor
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / CONFIG).read_text()))
