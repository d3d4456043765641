"""The operations of a layer between its linears, as Triton kernels; see :class:`Backend`."""

from __future__ import annotations

import torch
from torch import Tensor

from aioengine.kernels.backend import HeadNorms
from aioengine.kernels.plan.attention import AttentionPlan
from aioengine.kernels.triton.jit.layer import (
    add_rms_norm_kernel,
    rope_store_kernel,
    silu_and_mul_kernel,
)
from aioengine.kernels.triton.launch import on, power_of_two

SILU_COLUMNS = 1024
ROPE_ELEMENTS = 2048
"""Elements of one token that a program rotates."""


def norm_warps(size: int) -> int:
    """Warps for a row of ``size``: each thread has at most 32 elements of it in registers, up to 32,768."""
    return min(32, max(4, power_of_two(size) // 1024))


def rope_heads(head_dim: int) -> int:
    """Heads of a program."""
    return max(1, ROPE_ELEMENTS // power_of_two(head_dim))


def add_rms_norm(hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """``hidden += delta``, then its norm; see :class:`Backend`."""
    rows, size = hidden.shape
    assert hidden.is_contiguous() and (delta is None or delta.is_contiguous())
    out = torch.empty_like(hidden)
    if rows == 0:
        return out
    with on(hidden.device):
        add_rms_norm_kernel[rows,](
            *(hidden, hidden if delta is None else delta, weight, out, size, eps),
            ADD=delta is not None,
            BLOCK=power_of_two(size),
            num_warps=norm_warps(size),
        )
    return out


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up``; see :class:`Backend`."""
    assert gate_up.is_contiguous()
    rows, size = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, size)
    if rows == 0:
        return out
    with on(out.device):
        silu_and_mul_kernel[rows, -(-size // SILU_COLUMNS)](gate_up, out, size, BLOCK=SILU_COLUMNS)
    return out


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
    assert qkv.is_contiguous() and keys[0].is_contiguous() and values.stride() == keys.stride()
    assert cos.is_contiguous() and sin.is_contiguous()
    tokens, all_heads, d = qkv.shape
    if tokens == 0:
        return
    kv_heads = keys.shape[2]
    block_h = rope_heads(d)
    q_norm, k_norm, eps = norms or (qkv, qkv, 0.0)
    with on(qkv.device):
        rope_store_kernel[tokens, -(-all_heads // block_h)](
            *(qkv, q_norm, k_norm, cos, sin, plan.cells, keys, values, keys.stride(0)),
            *(all_heads - 2 * kv_heads, kv_heads, d // 2, eps),
            NORM=norms is not None,
            BLOCK_SIZE=keys.shape[1],
            BLOCK_H=block_h,
            BLOCK_D=power_of_two(d // 2),
        )
