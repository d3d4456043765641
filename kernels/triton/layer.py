"""The operations of a layer between its linears, as Triton kernels; see :class:`Backend`."""

from __future__ import annotations

from torch import Tensor

from aioengine.kernels.backend import HeadNorms, LayerCache, Norm, Rotation
from aioengine.kernels.plan.attention import AttentionPlan
from aioengine.kernels.triton.jit.layer import (
    KINDS,
    activate_kernel,
    add_rms_norm_kernel,
    rope_store_kernel,
)
from aioengine.kernels.triton.launch import on, power_of_two

SILU_COLUMNS = 1024
ROPE_ELEMENTS = 2048
"""Elements of one token that a program rotates."""


def norm_warps(size: int) -> int:
    """Warps for a row of ``size``: each thread has at most 32 elements of it in registers, up to 32,768."""
    return min(32, max(4, power_of_two(size) // 1024))


def rope_heads(head_dim: int) -> int:
    """Return the number of heads of a program."""
    return max(1, ROPE_ELEMENTS // power_of_two(head_dim))


def add_rms_norm(hidden: Tensor, delta: Tensor | None, norm: Norm, factor: float = 1.0) -> Tensor:
    """``hidden += delta``, then its norm; see :class:`Backend`."""
    weight, eps, offset = norm
    rows, size = hidden.shape
    assert hidden.is_contiguous() and (delta is None or delta.is_contiguous())
    out = hidden.new_empty(hidden.shape)
    if rows == 0:
        return out
    with on(hidden.device):
        add_rms_norm_kernel[rows,](
            *(
                hidden,
                hidden if delta is None else delta,
                weight,
                out,
                size,
                size,
                eps,
                offset or 0.0,
                factor,
            ),
            ADD=delta is not None,
            ROUNDED=offset is None,
            BLOCK=power_of_two(size),
            num_warps=norm_warps(size),
        )
    return out


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up``; see :class:`Backend`."""
    return _activate(gate_up, "silu")


def gelu_and_mul(gate_up: Tensor) -> Tensor:
    """``gelu(gate) * up``; see :class:`Backend`."""
    return _activate(gate_up, "gelu")


def clamped_swiglu(gate_up: Tensor, *, alpha: float, limit: float) -> Tensor:
    """``g * sigmoid(alpha * g) * (u + 1)``; see :class:`Backend`."""
    return _activate(gate_up, "clamped", alpha, limit)


def _activate(gate_up: Tensor, kind: str, alpha: float = 1.0, limit: float = 0.0) -> Tensor:
    assert gate_up.is_contiguous()
    rows, size = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, size)
    if rows == 0:
        return out
    with on(out.device):
        activate_kernel[rows, -(-size // SILU_COLUMNS)](
            *(gate_up, out, size, alpha, limit), KIND=KINDS.index(kind), BLOCK=SILU_COLUMNS
        )
    return out


def rope_store(
    qkv: Tensor, norms: HeadNorms | None, rotation: Rotation, cache: LayerCache, plan: AttentionPlan
) -> None:
    """Norm, rotate and store; see :class:`Backend`."""
    keys, values = cache
    cos, sin, neighbours = rotation
    assert qkv.is_contiguous() and keys[0].is_contiguous() and values.stride() == keys.stride()
    assert cos.is_contiguous() and sin.is_contiguous()
    tokens, all_heads, d = qkv.shape
    if tokens == 0:
        return
    kv_heads = keys.shape[2]
    heads, rotated = all_heads - 2 * kv_heads, cos.shape[-1]
    block_h = rope_heads(d)
    if norms is not None and not len(norms.q) == len(norms.k) == d:
        _norm_(qkv.view(tokens, -1), 0, heads * d, norms.q, norms)
        _norm_(qkv.view(tokens, -1), heads * d, kv_heads * d, norms.k, norms)
        norms = None
    q_norm, k_norm, eps, offset = norms or (qkv, qkv, 0.0, None)
    with on(qkv.device):
        rope_store_kernel[tokens, -(-all_heads // block_h)](
            *(qkv, q_norm, k_norm, cos, sin, plan.cells, keys, values, keys.stride(0)),
            *(heads, kv_heads, d // 2, rotated, eps, offset or 0.0),
            NORM=norms is not None,
            ROUNDED=offset is None,
            NEIGHBOURS=neighbours,
            PARTIAL=2 * rotated < d,
            BLOCK_SIZE=keys.shape[1],
            BLOCK_H=block_h,
            BLOCK_D=power_of_two(d // 2),
        )


def _norm_(rows: Tensor, begin: int, width: int, weight: Tensor, norms: HeadNorms) -> None:
    """Norm ``width`` columns of ``rows`` [T, ...] from ``begin`` on, in place; ``weight`` [width]."""
    assert len(weight) == width, "norms are of one head, or of all"
    part = rows[:, begin : begin + width]
    add_rms_norm_kernel[len(rows),](
        *(part, part, weight, part, width, rows.stride(0), norms.eps, norms.offset or 0.0, 1.0),
        ADD=False,
        ROUNDED=norms.offset is None,
        BLOCK=power_of_two(width),
        num_warps=norm_warps(width),
    )
