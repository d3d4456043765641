"""The decoder: a pre-norm transformer of the Llama family with fused linears, on plain tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from aioengine.kernels import LoRABackend, LoRABatch
from aioengine.kernels.cpu.packed import PackedWeight
from aioengine.model.attention import AttentionPlan, paged_attention
from aioengine.model.kv_cache import KVCache
from aioengine.model.layers import rms_norm, silu_and_mul
from aioengine.model.lora_slots import FusedLoRA, LoRASlots
from aioengine.model.rope import Rope, rotate_
from aioengine.model.slot_layout import FUSED_MODULES
from aioengine.model.spec import ModelSpec


@dataclass(slots=True)
class Linear:
    weight: Tensor | PackedWeight
    """[out, in]"""
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]"""
        if isinstance(self.weight, PackedWeight):
            return self.weight.linear(x, self.bias)
        return F.linear(x, self.weight, self.bias)

    def rows(self, begin: int, end: int) -> Tensor:
        """Rows ``begin..end-1`` of the weight: a view, or a copy if it is packed."""
        if isinstance(self.weight, PackedWeight):
            return self.weight.rows(begin, end)
        return self.weight[begin:end]

    def pack(self) -> None:
        """Rearranges the weight for the CPU library; what was a view of it no longer is."""
        if isinstance(self.weight, Tensor):
            self.weight = PackedWeight.pack(self.weight)


@dataclass(slots=True)
class Layer:
    input_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Linear
    post_attention_norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass(slots=True)
class StepInputs:
    """One step over T tokens; all tensors on the decoder's device."""

    token_ids: Tensor
    """[T]"""
    sample_rows: Tensor
    """[N] the token rows whose next token is wanted."""
    attention: AttentionPlan
    lora: LoRABatch
    """The tokens by adapter slot."""
    sample_lora: LoRABatch
    """The same for ``sample_rows``."""


class Decoder:
    """Weights and forward pass. The weights are uninitialised until they are loaded."""

    def __init__(
        self, spec: ModelSpec, dtype: torch.dtype, device: torch.device, kernels: LoRABackend
    ) -> None:
        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        def linear(fused: str, has_bias: bool) -> Linear:
            shapes = [spec.linear(module) for module in FUSED_MODULES[fused]]
            n_out = sum(shape.out_features for shape in shapes)
            return Linear(empty(n_out, shapes[0].in_features), empty(n_out) if has_bias else None)

        self.spec = spec
        self.dtype = dtype
        self.device = device
        self.kernels = kernels
        self.rope = Rope(spec.rope, spec.head_dim, device)
        self.embed_tokens: Tensor | PackedWeight = empty(spec.vocab_size, spec.hidden_size)
        self.layers = [
            Layer(
                input_norm=empty(spec.hidden_size),
                qkv=linear("qkv", spec.qkv_bias),
                q_norm=empty(spec.head_dim) if spec.qk_norm else None,
                k_norm=empty(spec.head_dim) if spec.qk_norm else None,
                o=linear("o", spec.o_bias),
                post_attention_norm=empty(spec.hidden_size),
                gate_up=linear("gate_up", spec.mlp_bias),
                down=linear("down", spec.mlp_bias),
            )
            for _ in range(spec.num_layers)
        ]
        self.norm = empty(spec.hidden_size)
        tied = spec.tie_embeddings
        self.head = Linear(self.embed_tokens if tied else empty(spec.vocab_size, spec.hidden_size), None)
        self.nbytes = sum(parameter.nbytes for parameter in self.parameters().values())
        """Bytes of the weights."""

    def parameters(self) -> dict[str, Tensor]:
        """Every parameter under its Hugging Face name, as a view of where it is stored.

        The views cover the decoder's weights exactly once; a tied head appears as the embedding. To be
        called before they are packed.
        """
        assert isinstance(self.embed_tokens, Tensor) and isinstance(self.head.weight, Tensor)
        out = {"model.embed_tokens.weight": self.embed_tokens, "model.norm.weight": self.norm}
        if not self.spec.tie_embeddings:
            out["lm_head.weight"] = self.head.weight
        for i, layer in enumerate(self.layers):
            prefix = f"model.layers.{i}"
            out[f"{prefix}.input_layernorm.weight"] = layer.input_norm
            out[f"{prefix}.post_attention_layernorm.weight"] = layer.post_attention_norm
            if layer.q_norm is not None and layer.k_norm is not None:
                out[f"{prefix}.self_attn.q_norm.weight"] = layer.q_norm
                out[f"{prefix}.self_attn.k_norm.weight"] = layer.k_norm
            for fused, linear in self._linears(layer).items():
                block = "self_attn" if fused in ("qkv", "o") else "mlp"
                row = 0
                for module in FUSED_MODULES[fused]:
                    rows = self.spec.linear(module).out_features
                    name = f"{prefix}.{block}.{module}"
                    out[f"{name}.weight"] = linear.rows(row, row + rows)
                    if linear.bias is not None:
                        out[f"{name}.bias"] = linear.bias[row : row + rows]
                    row += rows
        return out

    def base_weight(self, layer: int, module: str) -> tuple[Tensor, Tensor | None]:
        """Weight [out, in] and bias [out] of what LoRA can target; an embedding transposed."""
        if module in ("embed_tokens", "lm_head"):
            weight = self.embed_tokens if module == "embed_tokens" else self.head.weight
            whole = weight if isinstance(weight, Tensor) else weight.rows(0, weight.n)
            return whole.T if module == "embed_tokens" else whole, None
        for fused, linear in self._linears(self.layers[layer]).items():
            row = 0
            for member in FUSED_MODULES[fused]:
                end = row + self.spec.linear(member).out_features
                if member == module:
                    return linear.rows(row, end), None if linear.bias is None else linear.bias[row:end]
                row = end
        raise KeyError(module)

    @staticmethod
    def _linears(layer: Layer) -> dict[str, Linear]:
        return {"qkv": layer.qkv, "o": layer.o, "gate_up": layer.gate_up, "down": layer.down}

    def pack(self) -> None:
        """Rearrange all weights for the CPU library, one after the other."""
        for layer in self.layers:
            for linear in self._linears(layer).values():
                linear.pack()
        tied = self.head.weight is self.embed_tokens
        if tied:
            self.embed_tokens = self.norm  # or it would be kept beside its packed copy
        self.head.pack()
        if tied:
            self.embed_tokens = self.head.weight

    def embed(self, inputs: StepInputs, slots: LoRASlots | None) -> Tensor:
        """The hidden state [T, hidden] that the first layer gets."""
        if isinstance(self.embed_tokens, PackedWeight):
            hidden = self.embed_tokens.gather(inputs.token_ids)
        else:
            hidden = F.embedding(inputs.token_ids, self.embed_tokens)
        pool = slots.outer.get("embed_tokens") if slots else None
        if pool is not None and inputs.lora.segments:
            h = self.kernels.lora_embed(inputs.token_ids, pool.a, inputs.lora)
            self._expand(h.to(hidden.dtype), pool, hidden, inputs.lora)
        return hidden

    def forward(self, inputs: StepInputs, cache: KVCache, slots: LoRASlots | None) -> Tensor:
        """The logits of ``inputs.sample_rows``: [N, vocab] in the compute dtype."""
        spec, plan = self.spec, inputs.attention
        cos, sin = self.rope.cos_sin(plan.positions)
        heads, qk_heads = spec.num_heads, spec.num_heads + spec.num_kv_heads
        hidden = self.embed(inputs, slots)
        for i, layer in enumerate(self.layers):
            apply = self._linear_with_lora(inputs.lora, slots.layers[i] if slots else {})

            x = rms_norm(hidden, layer.input_norm, spec.rms_norm_eps)
            qkv = apply("qkv", layer.qkv, x).view(len(x), -1, spec.head_dim)
            q, k, v = qkv[:, :heads], qkv[:, heads:qk_heads], qkv[:, qk_heads:]
            if layer.q_norm is not None and layer.k_norm is not None:
                q.copy_(rms_norm(q, layer.q_norm, spec.rms_norm_eps))
                k.copy_(rms_norm(k, layer.k_norm, spec.rms_norm_eps))
            rotate_(qkv[:, :qk_heads], cos, sin)
            attended = paged_attention(q, k, v, cache, i, plan, spec.window(i))
            hidden += apply("o", layer.o, attended)

            x = rms_norm(hidden, layer.post_attention_norm, spec.rms_norm_eps)
            x = silu_and_mul(apply("gate_up", layer.gate_up, x))
            hidden += apply("down", layer.down, x)

        hidden = hidden.index_select(0, inputs.sample_rows)
        apply = self._linear_with_lora(inputs.sample_lora, slots.outer if slots else {})
        return apply("lm_head", self.head, rms_norm(hidden, self.norm, spec.rms_norm_eps))

    def _linear_with_lora(
        self, batch: LoRABatch, pools: dict[str, FusedLoRA]
    ) -> Callable[[str, Linear, Tensor], Tensor]:
        """``apply(name, linear, x)``: the linear, plus each token's adapter if it targets the linear."""

        def apply(fused: str, linear: Linear, x: Tensor) -> Tensor:
            y = linear(x)
            pool = pools.get(fused)
            if pool is not None and batch.segments:
                h = self.kernels.lora_shrink(x, pool.a, batch, len(pool.modules))
                self._expand(h, pool, y, batch)
            return y

        return apply

    def _expand(self, h: Tensor, pool: FusedLoRA, y: Tensor, batch: LoRABatch) -> None:
        """Completes y, the base linear's output, in place."""
        self.kernels.lora_expand(h, pool.b, y, pool.offsets, batch)
        if batch.affine:
            self.kernels.lora_affine(y, pool.affine, pool.offsets, batch)
