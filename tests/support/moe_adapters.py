"""Tiny models with experts, adapters on every part of them, and what transformers and peft make of these."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from support.any_models import config_of, randomize
from support.quantized_checkpoints import Quantize, quantize_model
from torch import Tensor

SIZES: dict[str, Any] = {"hidden_size": 64, "head_dim": 16, "moe_intermediate_size": 32}
SIZES |= {"intermediate_size": 48, "shared_expert_intermediate_size": 48}
NAMES = {"mixtral": ("block_sparse_moe", "w1", "w3", "w2")}
USUAL = ("mlp", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA = 3, 6
PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


class MoeModel:
    """A model on disk with adapters of several forms, and the same in memory, each merged or with peft."""

    def __init__(self, root: Path, family: str, **overrides: Any) -> None:
        self.family, self._root = family, root
        sizes = {k: v for k, v in SIZES.items() if not (family == "olmoe" and k == "head_dim")}
        config = config_of(family, **{**sizes, **overrides})
        self.base: Any = randomize(transformers.AutoModelForCausalLM.from_config(config))
        self.folder, self.adapters = root / "model", dict[str, Path]()
        self.base.save_pretrained(self.folder)
        self.router = "router" if family == "gpt_oss" else "gate"
        """Name of a layer's router."""
        self._references: dict[str | None, Any] = {None: self.base}

    def quantize(self, quantize: Quantize, config: Mapping[str, Any], wanted: Callable[[str], bool]) -> Path:
        """Round the weights that are ``wanted``, and return a folder that has them quantized. Adapters are to
        be added afterwards."""
        pair = quantize_model(self.folder, self._root / "quantized", quantize, config, wanted)
        self.base = transformers.AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()
        self._references[None] = self.base
        return pair.packed

    def logits(self, tokens: Sequence[int], adapter: str | None) -> Tensor:
        """[len(tokens), vocab], in one pass."""
        with torch.no_grad():
            model = self._references[adapter]
            return model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]

    def add_by_peft(self, name: str, seed: int, **settings: Any) -> None:
        """Add an adapter that peft makes, saves and applies."""
        config = LoraConfig(**{"r": RANK, "lora_alpha": ALPHA, **settings})
        peft: Any = get_peft_model(copy.deepcopy(self.base), config)
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in peft.named_parameters():
            if "lora_" in key:
                parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
        peft.save_pretrained(self._root / name)
        self.adapters[name], self._references[name] = self._root / name, peft.eval()

    def add_by_module(self, name: str, seed: int, kinds: Sequence[int], *, dora: bool = False) -> None:
        """Add an adapter on each expert's linears (0: gate, 1: up, 2: down) and the router, as files have it
        that were trained where these were modules; the reference has it merged into its weights."""
        block, *linears = NAMES.get(self.family, USUAL)
        model, tensors = copy.deepcopy(self.base), dict[str, Tensor]()
        generator = torch.Generator().manual_seed(seed)

        def pair(key: str, weight: Tensor) -> None:
            a, b = (
                0.2 * torch.randn(*shape, generator=generator)
                for shape in ((RANK, weight.shape[1]), (weight.shape[0], RANK))
            )
            tensors[f"base_model.model.{key}.lora_A.weight"] = a
            tensors[f"base_model.model.{key}.lora_B.weight"] = b
            weight += ALPHA / RANK * b @ a
            if dora:
                magnitude = weight.norm(dim=1) * (1 + 0.2 * torch.randn(len(weight), generator=generator))
                tensors[f"base_model.model.{key}.lora_magnitude_vector"] = magnitude.clone()
                weight *= (magnitude / weight.norm(dim=1))[:, None]

        with torch.no_grad():
            for i, layer in enumerate(model.model.layers):
                if not hasattr(layer.mlp, "experts"):
                    continue
                router = layer.mlp.get_submodule(self.router)
                pair(f"model.layers.{i}.{block}.{self.router}", router.weight)
                for e, (gate_up, down) in enumerate(
                    zip(layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj, strict=True)
                ):
                    weights = (*gate_up.chunk(2), down)
                    if self.family == "gpt_oss":  # [in, out], outputs of gate and up alternate
                        weights = (gate_up.T[::2], gate_up.T[1::2], down.T)
                    for kind in kinds:
                        pair(f"model.layers.{i}.{block}.experts.{e}.{linears[kind]}", weights[kind])
        folder = self._root / name
        folder.mkdir()
        save_file(tensors, folder / "adapter_model.safetensors")
        modules = sorted({key.split(".lora_")[0].removeprefix("base_model.model.") for key in tensors})
        settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": modules}
        settings["use_dora"] = dora
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        self.adapters[name], self._references[name] = folder, model.eval()
