"""The operations of a layer between its linears, and the linears of experts, by the CPU library; see
:class:`Backend`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from aioengine.kernels.backend import HeadNorms, LayerCache, Norm, Rotation, Scores
from aioengine.kernels.cpu import structs
from aioengine.kernels.cpu.cores import threads
from aioengine.kernels.cpu.packed import DTYPES, PANEL, LibraryWeight, is_bf16, pointer
from aioengine.kernels.cpu.shared_library import load
from aioengine.kernels.plan.attention import AttentionPlan
from aioengine.kernels.plan.experts import ExpertPlan
from aioengine.kernels.portable import plain
from aioengine.kernels.weight import Weight

_LANES = 16
"""Block sizes and head dimensions must be multiples of a vector's."""


def add_rms_norm(hidden: Tensor, delta: Tensor | None, norm: Norm, factor: float = 1.0) -> Tensor:
    """``hidden += delta``, then its norm; see :class:`Backend`."""
    if hidden.dtype not in DTYPES:
        return plain.add_rms_norm(hidden, delta, norm, factor)
    assert hidden.is_contiguous() and (delta is None or delta.is_contiguous())
    weight, eps, offset = norm
    out = torch.empty_like(hidden)
    load().aio_add_rms_norm(
        *(is_bf16(hidden), hidden.data_ptr(), pointer(delta), None, weight.data_ptr(), out.data_ptr()),
        *(*hidden.shape, factor, eps, offset is None, offset or 0.0, threads()),
    )
    return out


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up``; see :class:`Backend`."""
    return _activate(gate_up, "silu") if gate_up.dtype in DTYPES else plain.silu_and_mul(gate_up)


def gelu_and_mul(gate_up: Tensor) -> Tensor:
    """``gelu(gate) * up``; see :class:`Backend`."""
    return _activate(gate_up, "gelu_tanh") if gate_up.dtype in DTYPES else plain.gelu_and_mul(gate_up)


def clamped_swiglu(gate_up: Tensor, *, alpha: float, limit: float) -> Tensor:
    """``g * sigmoid(alpha * g) * (u + 1)``; see :class:`Backend`."""
    if gate_up.dtype not in DTYPES:
        return plain.clamped_swiglu(gate_up, alpha=alpha, limit=limit)
    return _activate(gate_up, "clamped_swiglu", alpha, limit)


def _activate(gate_up: Tensor, name: str, alpha: float = 0.0, limit: float = 0.0) -> Tensor:
    assert gate_up.is_contiguous()
    rows, size = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, size)
    kind = structs.ACTIVATIONS.index(name)
    gate = structs.Gate(is_bf16(out), kind, alpha, limit, out.data_ptr())
    load().aio_activate(ctypes.byref(gate), gate_up.data_ptr(), rows, size, threads())
    return out


def soft_cap_(x: Tensor, cap: float) -> None:
    """``cap * tanh(x / cap)``, with the same bits wherever an element is; see :class:`Backend`."""
    if x.dtype not in DTYPES or x.numel() % _LANES:
        return plain.soft_cap_(x, cap)
    assert x.is_contiguous()
    load().aio_soft_cap(is_bf16(x), x.data_ptr(), x.numel(), cap, threads())


def argmax(logits: Tensor) -> Tensor:
    """First index of each row's largest value, -1 if that is not finite; see :class:`Backend`."""
    if logits.dtype not in DTYPES or not logits.is_contiguous():
        return plain.argmax(logits)
    best = torch.empty(len(logits), dtype=torch.int64)
    load().aio_argmax(is_bf16(logits), logits.data_ptr(), *logits.shape, best.data_ptr(), threads())
    return best


def rope_store(
    qkv: Tensor, norms: HeadNorms | None, rotation: Rotation, cache: LayerCache, plan: AttentionPlan
) -> None:
    """Norm, rotate and store, with 16 keys as one vector; see :class:`Backend` and ``attention.cpp``."""
    keys, values = cache
    if not _ours(keys):
        return plain.rope_store(qkv, norms, rotation, cache, plan)
    cos, sin, neighbours = rotation
    assert qkv.is_contiguous() and cos.is_contiguous() and sin.is_contiguous()
    _, block_size, kv_heads, d = keys.shape
    tokens, heads = len(qkv), qkv.shape[1] - 2 * kv_heads
    load().aio_rope_store(
        *(is_bf16(qkv), qkv.data_ptr(), cos.data_ptr(), sin.data_ptr(), plan.cells.data_ptr()),
        *(plan.last.data_ptr(), keys.data_ptr(), values.data_ptr()),
        *(tokens, heads, kv_heads, d, block_size),
        *(
            cos.shape[-1],
            neighbours,
            0,
            None if norms is None else ctypes.byref(head_norms_struct(norms)),
            threads(),
        ),
    )


def paged_attention(qkv: Tensor, cache: LayerCache, plan: AttentionPlan, scores: Scores) -> Tensor:
    """Attend to what is stored, all sequences in one call; see :class:`Backend`."""
    keys, values = cache
    if not _ours(keys):
        return plain.paged_attention(qkv, cache, plan, scores)
    window, scale, soft_cap, sinks = scores
    _, block_size, kv_heads, d = keys.shape
    heads = qkv.shape[1] - 2 * kv_heads
    assert sinks is None or (sinks.dtype == qkv.dtype and sinks.is_contiguous())
    out = qkv.new_empty(len(qkv), heads * d)
    load().aio_attention(
        *(is_bf16(qkv), qkv.data_ptr(), qkv.stride(0), keys.data_ptr(), values.data_ptr()),
        *(plan.tables.data_ptr(), plan.tables.shape[1], plan.span_table.data_ptr(), len(plan.spans)),
        *(out.data_ptr(), heads, kv_heads, d, block_size, window or 0),
        *(d**-0.5 if scale is None else scale, soft_cap or 0.0, pointer(sinks), 0, threads()),
    )
    return out


def head_norms_struct(norms: HeadNorms) -> structs.HeadNorms:
    """Make the C structure, which points to the memory and does not keep it alive."""
    return structs.HeadNorms(
        *(norms.q.data_ptr(), norms.k.data_ptr(), len(norms.q), len(norms.k)),
        *(norms.offset is None, norms.eps, norms.offset or 0.0),
    )


def _ours(keys: Tensor) -> bool:
    """Whether a cache of this type and shape is in the library's layout."""
    return keys.dtype in DTYPES and keys.shape[1] % _LANES == 0 and keys.shape[3] % _LANES == 0


def expert_linear(x: Tensor, weight: Weight, bias: Tensor | None, plan: ExpertPlan) -> Tensor:
    """``y[s] = W[expert(s)] x[s]``, all experts in one call if they are packed; see :class:`Backend`."""
    out = weight.n // plan.experts
    if not isinstance(weight, LibraryWeight) or out % PANEL:
        return plain.expert_linear(x, weight, bias, plan)
    x = x.contiguous()
    counts = torch.zeros(plan.experts + 1, dtype=torch.int32)
    for expert, start, stop in plan.groups:
        counts[expert + 1] = stop - start
    return weight.experts(x, bias, counts.cumsum(0, dtype=torch.int32))
