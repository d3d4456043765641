"""The backend ``torch``: plain torch on any device. It is used where no other backend is available."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from aioengine.kernels.backend import HeadNorms, LayerCache, Norm, Rotation
from aioengine.kernels.plan.attention import AttentionPlan
from aioengine.kernels.plan.experts import ExpertPlan
from aioengine.kernels.portable.cells import put
from aioengine.kernels.portable.grouped import lora_affine as lora_affine
from aioengine.kernels.portable.grouped import lora_embed as lora_embed
from aioengine.kernels.portable.grouped import lora_expand as lora_expand
from aioengine.kernels.portable.grouped import lora_shrink as lora_shrink
from aioengine.kernels.portable.sdpa import paged_attention as paged_attention
from aioengine.kernels.weight import PIECE_ELEMENTS, PlainWeight, Weight

name = "torch"
capturable = False


def linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """``x W^T + bias``; see :class:`Backend`."""
    return weight.linear(x, bias)


def expert_linear(x: Tensor, weight: Weight, bias: Tensor | None, plan: ExpertPlan) -> Tensor:
    """``y[s] = W[expert(s)] x[s]``, an expert after the other, of which only a few rows are expanded at a
    time if they are not plain; see :class:`Backend`."""
    out = weight.n // plan.experts
    size = out if isinstance(weight, PlainWeight) else max(1, min(out, PIECE_ELEMENTS // weight.k))
    y = x.new_empty(len(x), out)
    for expert, start, stop in plan.groups:
        for first in range(0, out, size):
            last = min(first + size, out)
            begin, end = expert * out + first, expert * out + last
            own = None if bias is None else bias[begin:end]
            y[start:stop, first:last] = F.linear(x[start:stop], weight.rows(begin, end), own)
    return y


def add_rms_norm(hidden: Tensor, delta: Tensor | None, norm: Norm, factor: float = 1.0) -> Tensor:
    """``hidden += delta``, then its norm; see :class:`Backend`."""
    if delta is not None:
        hidden.add_(delta, alpha=factor)
    return _rms_norm(hidden, *norm)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up``; see :class:`Backend`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def gelu_and_mul(gate_up: Tensor) -> Tensor:
    """``gelu(gate) * up``; see :class:`Backend`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh").mul_(up)


def clamped_swiglu(gate_up: Tensor, *, alpha: float, limit: float) -> Tensor:
    """``g * sigmoid(alpha * g) * (u + 1)``; see :class:`Backend`."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    gate = gate.clamp(max=limit)
    active = (alpha * gate).sigmoid_().mul_(gate)
    return up.clamp(-limit, limit).add_(1).mul_(active).to(gate_up.dtype)


def soft_cap_(x: Tensor, cap: float) -> None:
    """``cap * tanh(x / cap)``; see :class:`Backend`."""
    x.div_(cap).tanh_().mul_(cap)


def argmax(logits: Tensor) -> Tensor:
    """First index of each row's largest value, -1 if that is not finite; see :class:`Backend`."""
    best = logits.argmax(dim=-1)
    top = logits.gather(1, best[:, None])[:, 0]
    return best.masked_fill_(~torch.isfinite(top), -1)


def rope_store(
    qkv: Tensor, norms: HeadNorms | None, rotation: Rotation, cache: LayerCache, plan: AttentionPlan
) -> None:
    """Norm, rotate and store; see :class:`Backend`."""
    kv_heads = cache.keys.shape[2]
    q, k, v = qkv.tensor_split([-2 * kv_heads, -kv_heads], dim=1)
    if norms is not None:
        for x, weight in ((q, norms.q), (k, norms.k)):
            normed = _rms_norm(x.reshape(len(x), -1, len(weight)), weight, norms.eps, norms.offset)
            x.copy_(normed.view(x.shape))
    _rotate_(qkv[:, :-kv_heads], *rotation)
    put(cache.keys, plan.cells, k)
    put(cache.values, plan.cells, v)


def _rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float | None) -> Tensor:
    """Over the last dimension."""
    wide = x.to(torch.float32)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if offset is not None:
        return (wide * scale * (weight.to(torch.float32) + offset)).to(x.dtype)
    return weight * (wide * scale).to(x.dtype)


def _rotate_(x: Tensor, cos: Tensor, sin: Tensor, neighbours: bool) -> None:
    """Rotate ``x`` [T, heads, d] in place, in float32 arithmetic."""
    half = cos.shape[-1]
    if neighbours:
        x1, x2 = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
    else:
        x1, x2 = x[..., :half], x[..., half : 2 * half]
    new1 = x1 * cos - x2 * sin
    new2 = x2 * cos + x1 * sin
    x1.copy_(new1)
    x2.copy_(new2)
