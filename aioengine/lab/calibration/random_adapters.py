"""PEFT folders with random weights, for runs on a live engine that measure time."""

from __future__ import annotations

import json
from pathlib import Path

from aioengine.model.spec import ModelSpec


def write_random_adapter(
    folder: Path, spec: ModelSpec, rank: int, *, seed: int, dtype: str | None = None
) -> Path:
    """Write small random A and B matrices for all linears that slots usually hold; returns ``folder``.

    ``dtype`` is torch's name for the dtype of the file; None means the checkpoint's.
    """
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    modules = set(spec.targets(None))
    for layer, module in spec.adaptable():
        if module in modules and not spec.is_bare(module):
            shape, key = spec.linear(module), f"base_model.model.{spec.module_name(layer, module)}"
            for name, size in (("A", (rank, shape.in_features)), ("B", (shape.out_features, rank))):
                noise = torch.randn(*size, generator=generator) * 0.02
                tensors[f"{key}.lora_{name}.weight"] = noise.to(getattr(torch, dtype or spec.dtype))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted({key.split(".")[-3] for key in tensors}),
        "bias": "none",
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
