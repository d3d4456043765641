"""The oracle: every operation in the plainest way, accumulated in float32.

LoRA: Hu et al., 2021, https://arxiv.org/abs/2106.09685. Splitting it into shrink and expand over tokens
grouped by adapter follows Punica: Chen et al., 2023, https://arxiv.org/abs/2310.18547.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from aioengine.kernels.backend import HeadNorms, LayerCache, Norm, Rotation, Scores
from aioengine.kernels.plan.attention import AttentionPlan
from aioengine.kernels.plan.experts import ExpertPlan
from aioengine.kernels.plan.lora import LoRABatch
from aioengine.kernels.slots import LoRAPool
from aioengine.kernels.weight import Weight

name = "reference"
capturable = False


def linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """``x W^T + bias``; see :class:`aioengine.kernels.backend.Backend`."""
    y = x.float() @ weight.rows(0, weight.n).float().T
    return (y if bias is None else y + bias.float()).to(x.dtype)


def expert_linear(x: Tensor, weight: Weight, bias: Tensor | None, plan: ExpertPlan) -> Tensor:
    """``y[s] = W[expert(s)] x[s]``; see :class:`Backend`."""
    out = weight.n // plan.experts
    y = x.new_empty(len(x), out)
    for expert, start, stop in plan.groups:
        own = slice(expert * out, (expert + 1) * out)
        rows = x[start:stop].float() @ weight.rows(own.start, own.stop).float().T
        y[start:stop] = (rows if bias is None else rows + bias[own].float()).to(x.dtype)
    return y


def add_rms_norm(hidden: Tensor, delta: Tensor | None, norm: Norm, factor: float = 1.0) -> Tensor:
    """``hidden += delta``, then its norm; see :class:`Backend`."""
    if delta is not None:
        hidden.copy_(hidden.float() + factor * delta.float())
    return _rms_norm(hidden, *norm)


def _rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float | None) -> Tensor:
    """Over the last dimension."""
    normed = x.float() / (x.float().square().mean(-1, keepdim=True) + eps).sqrt()
    if offset is not None:
        return (normed * (offset + weight.float())).to(x.dtype)
    return (normed.to(x.dtype).float() * weight.float()).to(x.dtype)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up``; see :class:`Backend`."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    silu = (gate * gate.sigmoid()).to(gate_up.dtype)
    return (silu.float() * up).to(gate_up.dtype)


def gelu_and_mul(gate_up: Tensor) -> Tensor:
    """``gelu(gate) * up``; see :class:`Backend`."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    gelu = 0.5 * gate * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
    return (gelu.to(gate_up.dtype).float() * up).to(gate_up.dtype)


def clamped_swiglu(gate_up: Tensor, *, alpha: float, limit: float) -> Tensor:
    """``g * sigmoid(alpha * g) * (u + 1)``; see :class:`Backend`."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (gate * (alpha * gate).sigmoid() * (up + 1)).to(gate_up.dtype)


def soft_cap_(x: Tensor, cap: float) -> None:
    """``cap * tanh(x / cap)``; see :class:`Backend`."""
    x.copy_(cap * torch.tanh(x.float() / cap))


def argmax(logits: Tensor) -> Tensor:
    """First index of each row's largest value, -1 if that is not finite; see :class:`Backend`."""
    rows = [[float(value) for value in row] for row in logits]
    largest = [math.nan if any(map(math.isnan, row)) else max(row) for row in rows]
    best = [row.index(top) if math.isfinite(top) else -1 for row, top in zip(rows, largest, strict=True)]
    return torch.tensor(best, dtype=torch.int64, device=logits.device)


def rope_store(
    qkv: Tensor, norms: HeadNorms | None, rotation: Rotation, cache: LayerCache, plan: AttentionPlan
) -> None:
    """Norm, rotate and store, head by head; see :class:`Backend`."""
    keys, values = cache
    kv_heads = keys.shape[2]
    heads = qkv.shape[1] - 2 * kv_heads
    if norms is not None:
        for begin, end, weight in ((0, heads, norms.q), (heads, heads + kv_heads, norms.k)):
            x = qkv[:, begin:end].reshape(len(qkv), -1, len(weight))
            normed = _rms_norm(x, weight, norms.eps, norms.offset)
            qkv[:, begin:end] = normed.reshape(len(qkv), end - begin, -1)
    half = rotation.cos.shape[-1]
    c, s = rotation.cos[:, 0], rotation.sin[:, 0]
    for head in range(heads + kv_heads):
        for i in range(half):
            # A slice: numbers in a list would be sent to the device.
            pair = slice(2 * i, 2 * i + 2) if rotation.neighbours else slice(i, i + half + 1, half)
            x1, x2 = qkv[:, head, pair].float().unbind(-1)
            rotated = [x1 * c[:, i] - x2 * s[:, i], x2 * c[:, i] + x1 * s[:, i]]
            qkv[:, head, pair] = torch.stack(rotated, dim=-1).to(qkv.dtype)
    blocks, offsets = plan.cells // plan.block_size, plan.cells % plan.block_size
    keys[blocks, offsets] = qkv[:, heads : heads + kv_heads]
    values[blocks, offsets] = qkv[:, heads + kv_heads :]


def paged_attention(qkv: Tensor, cache: LayerCache, plan: AttentionPlan, scores: Scores) -> Tensor:
    """Attend token by token; see :class:`Backend`."""
    keys, values = cache
    window, scale, soft_cap, sinks = scores
    kv_heads, d = keys.shape[2], keys.shape[3]
    heads = qkv.shape[1] - 2 * kv_heads
    out = qkv.new_empty(len(qkv), heads, d)
    for (row, length, start), table in zip(plan.spans, plan.tables, strict=True):
        for i in range(length):
            position = start + i
            first = 0 if window is None else max(0, position + 1 - window)
            seen = torch.arange(first, position + 1, device=qkv.device)
            blocks, offsets = table[seen // plan.block_size], seen % plan.block_size
            k, v = keys[blocks, offsets].float(), values[blocks, offsets].float()
            for head in range(heads):
                kv_head = head * kv_heads // heads
                found = k[:, kv_head] @ qkv[row + i, head].float() * (d**-0.5 if scale is None else scale)
                if soft_cap is not None:
                    found = soft_cap * torch.tanh(found / soft_cap)
                if sinks is not None:
                    found = torch.cat([found, sinks[head : head + 1].float()])
                out[row + i, head] = found.softmax(0)[: len(seen)] @ v[:, kv_head]
    return out.flatten(1)


def lora_shrink(x: Tensor, pool: LoRAPool, batch: LoRABatch) -> Tensor:
    """``h[t, j] = A[slot(t), j] x[t]``; see :class:`Backend`."""
    n = len(pool.modules)
    h = x.new_zeros(x.shape[0], n, batch.width)
    for slot, start, stop, _, weight in batch.segments:
        for j in range(n):
            a = pool.a(slot, j)
            h[start:stop, j, : len(a)] = weight * (x[start:stop].float() @ a.float().T)
    return h


def lora_expand(h: Tensor, pool: LoRAPool, y: Tensor, batch: LoRABatch) -> None:
    """``y[t, b_offsets[j]:] += B[j][slot(t)] h[t, j]``; see :class:`Backend`."""
    for slot, start, stop, *_ in batch.segments:
        for j, (width, offset) in enumerate(zip(pool.widths, pool.b_offsets, strict=True)):
            b = pool.b(slot, j)
            delta = h[start:stop, j, : b.shape[1]].float() @ b.float().T
            y_j = y[start:stop, offset : offset + width]
            y_j.copy_(y_j.float() + delta)


def lora_affine(y: Tensor, pool: LoRAPool, batch: LoRABatch) -> None:
    """``y[t, offsets[j]:] += gain * y[t, ...] + shift``; see :class:`Backend`."""
    for slot, start, stop, *_ in batch.affine:
        for j, (width, offset) in enumerate(zip(pool.affine_widths, pool.offsets, strict=True)):
            affine = pool.affine(slot, j)
            if affine is not None:
                gain, shift = affine.float()
                y_j = y[start:stop, offset : offset + width]
                y_j.copy_(y_j.float() + gain * y_j.float() + shift)


def lora_embed(token_ids: Tensor, pool: LoRAPool, batch: LoRABatch) -> Tensor:
    """``h[t, 0] = A[slot(t)][:, token_ids[t]]``; see :class:`Backend`."""
    h = torch.zeros(len(token_ids), 1, batch.width, dtype=pool.slots.dtype, device=pool.slots.memory.device)
    for slot, start, stop, _, weight in batch.segments:
        a = pool.a(slot, 0, token_ids[start:stop])
        h[start:stop, 0, : len(a)] = weight * a.T
    return h


def rotate(x: Tensor, block: int) -> Tensor:
    """Return ``x`` [..., k] in float32, with every ``block`` neighbours (a power of two) multiplied by a
    Hadamard matrix; 0: unchanged.

    The matrix is orthogonal and symmetric, so it is its own inverse, and the product of two rotated vectors
    equals that of the vectors.
    """
    x = x.float()
    if block == 0:
        return x
    matrix = torch.ones(1, 1)
    while len(matrix) < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    blocks = x.reshape(*x.shape[:-1], -1, block) @ matrix
    return blocks.div(block**0.5).flatten(-2)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row of ``x`` [n, k] to int8. Returns these and the scales [n, 1]; their product is about
    ``x``."""
    scale = x.abs().amax(dim=-1, keepdim=True) / 127
    return (x / scale.where(scale > 0, 1)).round().to(torch.int8), scale
