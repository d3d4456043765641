"""Greedy tokens of a tiny model like Llama with an adapter, guessed quickly; the model itself checks them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


class QuickLlama:
    """Transformers takes milliseconds for a token of a tiny model, and peft several times as long. This is
    the same model in a few operations of torch, with what LoRA or DoRA makes of its weights. What else an
    adapter may change is left out: then guesses are wrong."""

    @torch.no_grad()
    def __init__(self, model: Any) -> None:
        """``model``: one for causal language modelling of :data:`FAMILIES`, or a PeftModel of one."""
        llama = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._eps, self._head_dim = llama.config.rms_norm_eps, llama.model.layers[0].self_attn.head_dim
        self._angles = llama.model.rotary_emb
        self._embedding, self._norm = _weight(llama.model.embed_tokens), llama.model.norm.weight
        self._head = _weight(llama.lm_head)
        self._layers = []
        window = getattr(llama.config, "sliding_window", None)
        kinds = getattr(llama.config, "layer_types", None) or ["sliding_attention"] * len(llama.model.layers)
        self._windows = [window if kind == "sliding_attention" else None for kind in kinds]
        for layer in llama.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            weights = [_weight(module) for module in projections]
            biases = [getattr(module, "base_layer", module).bias for module in projections]
            norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
            self._layers.append(
                (
                    layer.input_layernorm.weight,
                    torch.cat(weights),
                    None if biases[0] is None else torch.cat(biases),
                    [weight.shape[0] // self._head_dim for weight in weights],
                    [None if norm is None else norm.weight for norm in norms],
                    _weight(attention.o_proj),
                    layer.post_attention_layernorm.weight,
                    torch.cat([_weight(mlp.gate_proj), _weight(mlp.up_proj)]),
                    _weight(mlp.down_proj),
                )
            )

    @torch.no_grad()
    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The next ``count`` tokens."""
        cos, sin = self._angles(self._embedding, torch.arange(len(prompt) + count)[None])
        past: list[tuple[Tensor, Tensor] | None] = [None] * len(self._layers)
        found: list[int] = []
        new, start = list(prompt), 0
        while len(found) < count:
            end = start + len(new)
            logits = self._step(new, (cos[0, start:end], sin[0, start:end]), past)
            found.append(int(logits.argmax()))
            new, start = found[-1:], end
        return found

    def _step(
        self, new: list[int], angles: tuple[Tensor, Tensor], past: list[tuple[Tensor, Tensor] | None]
    ) -> Tensor:
        size = self._embedding.shape[1:]
        hidden = F.embedding(torch.tensor(new), self._embedding)
        for index, (before, qkv, bias, heads, norms, out, after, gate_up, down) in enumerate(self._layers):
            x = F.linear(F.rms_norm(hidden, size, before, self._eps), qkv, bias)
            q, k, v = x.view(len(new), -1, self._head_dim).transpose(0, 1).split(heads)
            q, k = (
                _rotated(x if norm is None else F.rms_norm(x, norm.shape, norm, self._eps), *angles)
                for x, norm in zip((q, k), norms, strict=True)
            )
            if (cached := past[index]) is not None:
                k, v = torch.cat([cached[0], k], 1), torch.cat([cached[1], v], 1)
            past[index] = k, v
            keys = torch.arange(k.shape[1])
            ages = keys[-len(new) :, None] - keys
            seen = (ages >= 0) & (ages < (self._windows[index] or len(keys)))
            found = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=seen, enable_gqa=True)
            hidden = hidden + found[0].transpose(0, 1).flatten(1) @ out.T
            gate, up = (F.rms_norm(hidden, size, after, self._eps) @ gate_up.T).chunk(2, -1)
            hidden = hidden + (F.silu(gate) * up) @ down.T
        return F.rms_norm(hidden[-1], size, self._norm, self._eps) @ self._head.T


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def _weight(module: Any) -> Tensor:
    weight: Tensor = getattr(module, "base_layer", module).weight
    for name in getattr(module, "active_adapters", ()) if hasattr(module, "get_delta_weight") else ():
        if name in module.scaling:
            weight = weight + module.get_delta_weight(name)
            if name in module.lora_magnitude_vector and isinstance(module.base_layer, torch.nn.Linear):
                magnitude = module.lora_magnitude_vector[name].weight
                weight = weight * (magnitude / weight.norm(dim=1))[:, None]
    return weight
