"""LoRA in plain torch, on any device: a product for each segment and matrix.

It is used where neither the compiled library nor Triton is available.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aioengine.kernels.plan.lora import LoRABatch
from aioengine.kernels.slots import LoRAPool


def lora_shrink(x: Tensor, pool: LoRAPool, batch: LoRABatch) -> Tensor:
    """``h[t, j] = A[slot(t), j] x[t]``; see :class:`aioengine.kernels.backend.Backend`."""
    h = x.new_zeros(x.shape[0], len(pool.modules), batch.width)
    for slot, start, stop, _, weight in batch.segments:
        for j in range(len(pool.modules)):
            a = pool.a(slot, j)
            if len(a):
                found = x[start:stop] @ a.to(x.dtype).T
                h[start:stop, j, : len(a)] = found if weight == 1.0 else weight * found
    return h


def lora_expand(h: Tensor, pool: LoRAPool, y: Tensor, batch: LoRABatch) -> None:
    """``y[t, b_offsets[j]:] += B[j][slot(t)] h[t, j]``; see :class:`Backend`."""
    for slot, start, stop, *_ in batch.segments:
        for j, (width, offset) in enumerate(zip(pool.widths, pool.b_offsets, strict=True)):
            b = pool.b(slot, j)
            if b.shape[1]:
                delta = h[start:stop, j, : b.shape[1]] @ b.to(h.dtype).T
                y[start:stop, offset : offset + width] += delta


def lora_affine(y: Tensor, pool: LoRAPool, batch: LoRABatch) -> None:
    """``y[t, offsets[j]:] += gain * y[t, ...] + shift``; see :class:`Backend`."""
    for slot, start, stop, *_ in batch.affine:
        for j, (width, offset) in enumerate(zip(pool.affine_widths, pool.offsets, strict=True)):
            affine = pool.affine(slot, j)
            if affine is not None:
                rows = y[start:stop, offset : offset + width]
                rows.copy_(_scaled(rows, affine[0], affine[1]))


def _scaled(y: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """``y + gain * y + shift``, in float32 before it is rounded."""
    wide = y.float()
    return torch.addcmul(wide + shift, wide, gain.float())


def lora_embed(token_ids: Tensor, pool: LoRAPool, batch: LoRABatch) -> Tensor:
    """``h[t, 0] = A[slot(t)][:, token_ids[t]]``; see :class:`Backend`."""
    h = torch.zeros(len(token_ids), 1, batch.width, dtype=pool.slots.dtype, device=pool.slots.memory.device)
    for slot, start, stop, _, weight in batch.segments:
        a = pool.a(slot, 0, token_ids[start:stop])
        h[start:stop, 0, : len(a)] = weight * a.T
    return h
