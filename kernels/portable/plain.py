"""The backend ``torch``: plain torch on any device. It serves where nothing else can be had."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from aioengine.kernels.backend import HeadNorms
from aioengine.kernels.plan.attention import AttentionPlan
from aioengine.kernels.portable.cells import put
from aioengine.kernels.portable.grouped import lora_affine, lora_embed, lora_expand, lora_shrink
from aioengine.kernels.portable.sdpa import paged_attention
from aioengine.kernels.weight import Weight

name = "torch"
capturable = False

__all__ = [
    "add_rms_norm",
    "capturable",
    "linear",
    "lora_affine",
    "lora_embed",
    "lora_expand",
    "lora_shrink",
    "name",
    "paged_attention",
    "rope_store",
    "silu_and_mul",
]


def linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """``x W^T + bias``; see :class:`Backend`."""
    return weight.linear(x, bias)


def add_rms_norm(hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """``hidden += delta``, then its norm; see :class:`Backend`."""
    if delta is not None:
        hidden += delta
    return _rms_norm(hidden, weight, eps)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up``; see :class:`Backend`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def rope_store(
    qkv: Tensor,
    norms: HeadNorms | None,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    plan: AttentionPlan,
) -> None:
    """Norms, rotates and stores; see :class:`Backend`."""
    kv_heads = keys.shape[2]
    q, k, v = qkv.tensor_split([-2 * kv_heads, -kv_heads], dim=1)
    if norms is not None:
        q.copy_(_rms_norm(q, norms.q, norms.eps))
        k.copy_(_rms_norm(k, norms.k, norms.eps))
    _rotate_(qkv[:, :-kv_heads], cos, sin)
    put(keys, plan.cells, k)
    put(values, plan.cells, v)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Over the last dimension."""
    wide = x.to(torch.float32)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype)


def _rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotates ``x`` [T, heads, d] in place, in float32 arithmetic."""
    half = x.shape[-1] // 2
    x1, x2 = x[..., :half], x[..., half:]
    new1 = x1 * cos - x2 * sin
    new2 = x2 * cos + x1 * sin
    x1.copy_(new1)
    x2.copy_(new2)
