"""The operations of a layer between its linears, as Triton kernels; see :class:`Backend`."""

from __future__ import annotations

import functools

from torch import Tensor

from aioengine.kernels.backend import HeadNorms, LayerCache, Norm, Rotation
from aioengine.kernels.plan.attention import AttentionPlan
from aioengine.kernels.triton.jit.layer import (
    KINDS,
    activate_kernel,
    add_rms_norm_kernel,
    rope_store_kernel,
)
from aioengine.kernels.triton.launch import Launcher, launcher, power_of_two

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
    out = hidden.new_empty(rows, size)
    if rows:
        launch = _norm_launcher(size, delta is not None, offset is None)
        tensors = hidden, hidden if delta is None else delta, weight, out
        launch((rows, 1, 1), tensors, (size, size, eps, offset or 0.0, factor))
    return out


@functools.cache
def _norm_launcher(size: int, adds: bool, rounded: bool) -> Launcher:
    return Launcher(
        add_rms_norm_kernel,
        ADD=adds,
        ROUNDED=rounded,
        BLOCK=power_of_two(size),
        num_warps=norm_warps(size),
    )


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
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, size)
    if rows:
        grid = rows, -(-size // SILU_COLUMNS), 1
        launch = launcher(activate_kernel, KIND=KINDS.index(kind), BLOCK=SILU_COLUMNS)
        launch(grid, (gate_up, out), (size, alpha, limit))
    return out


def rope_store(
    qkv: Tensor, norms: HeadNorms | None, rotation: Rotation, cache: LayerCache, plan: AttentionPlan
) -> None:
    """Norm, rotate and store; see :class:`Backend`."""
    keys, values = cache
    cos, sin, neighbours = rotation
    assert qkv.is_contiguous() and cos.is_contiguous() and sin.is_contiguous()
    strides = keys.stride()
    assert values.stride() == strides
    tokens, all_heads, d = qkv.shape
    if tokens == 0:
        return
    kv_heads, rotated = keys.shape[2], cos.shape[-1]
    heads = all_heads - 2 * kv_heads
    if norms is not None and not len(norms.q) == len(norms.k) == d:
        _norm_(qkv.view(tokens, -1), 0, heads * d, norms.q, norms)
        _norm_(qkv.view(tokens, -1), heads * d, kv_heads * d, norms.k, norms)
        norms = None
    q_norm, k_norm, eps, offset = norms or (qkv, qkv, 0.0, None)
    kind = norms is not None, offset is None, neighbours, 2 * rotated < d
    launch, programs = _rope_launcher(keys.shape[1:], strides, all_heads, kind)
    launch(
        (tokens, programs, 1),
        (qkv, q_norm, k_norm, cos, sin, plan.cells, keys, values),
        (strides[0], heads, kv_heads, d // 2, rotated, eps, offset or 0.0),
    )


@functools.cache
def _rope_launcher(
    block: tuple[int, ...],
    strides: tuple[int, ...],
    all_heads: int,
    kind: tuple[bool, bool, bool, bool],
) -> tuple[Launcher, int]:
    """Return a launcher, and the programs for a token; ``block`` [block_size, K, d]."""
    block_size, kv_heads, d = block
    assert strides[1:] == (kv_heads * d, d, 1), "blocks must be contiguous"
    has_norms, rounded, neighbours, is_partial = kind
    block_h = rope_heads(d)
    launcher = Launcher(
        rope_store_kernel,
        NORM=has_norms,
        ROUNDED=rounded,
        NEIGHBOURS=neighbours,
        PARTIAL=is_partial,
        BLOCK_SIZE=block_size,
        BLOCK_H=block_h,
        BLOCK_D=power_of_two(d // 2),
    )
    return launcher, -(-all_heads // block_h)


def _norm_(rows: Tensor, begin: int, width: int, weight: Tensor, norms: HeadNorms) -> None:
    """Norm ``width`` columns of ``rows`` [T, ...] from ``begin`` on, in place; ``weight`` [width]."""
    assert len(weight) == width, "norms are of one head, or of all"
    part = rows[:, begin : begin + width]
    launch = _norm_launcher(width, False, norms.offset is None)
    numbers = width, rows.stride(0), norms.eps, norms.offset or 0.0, 1.0
    launch((len(rows), 1, 1), (part, part, weight, part), numbers)
