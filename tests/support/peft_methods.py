"""Adapters of PEFT's methods other than LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from support.peft_files import base_model

TARGETS = ["q_proj", "v_proj", "up_proj"]
FOLDED: dict[str, dict[str, Any]] = {
    "ADALORA": {"init_r": 3, "target_r": 2, "lora_alpha": 5, "total_step": 10},
    "LOHA": {"r": 3, "alpha": 5},
    "LOKR": {"r": 2, "alpha": 5, "decompose_factor": 4},
    "VERA": {"r": 8, "d_initial": 0.5},
}
"""``peft_type`` -> settings of an adapter that is folded into one of rank 16 at most."""


def save(folder: Path, method: str, **options: Any) -> Any:
    """Save a random adapter of ``method``. Returns PEFT's model."""
    config = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(method)](target_modules=TARGETS, **options)
    model = peft.get_peft_model(base_model(), config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora_", "hada_", "lokr_", "vera_lambda")):
            parameter.data = torch.randn_like(parameter) * 0.3
    model.save_pretrained(str(folder))
    return model


def changes(model: Any) -> dict[tuple[int, str], torch.Tensor]:
    """The weight change [out, in] that PEFT computes for each adapted linear."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight") and ".layers." in name:
            layer = int(name.split(".layers.")[1].split(".")[0])
            found[layer, name.rpartition(".")[2]] = module.get_delta_weight("default").detach()
    return found
