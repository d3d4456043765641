"""The oracle: every operation as a plain loop over segments, accumulated in float32.

LoRA: Hu et al., 2021, https://arxiv.org/abs/2106.09685. Splitting it into shrink and expand over tokens
grouped by adapter follows Punica: Chen et al., 2023, https://arxiv.org/abs/2310.18547.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from aioengine.kernels.batch import LoRABatch

name = "reference"


def lora_shrink(x: Tensor, a: Tensor, batch: LoRABatch, n_slices: int) -> Tensor:
    """``h[t, j] = A[slot(t), j] x[t]``; see :class:`aioengine.kernels.dispatch.LoRABackend`."""
    max_rank = a.shape[1] // n_slices
    h = x.new_zeros(x.shape[0], n_slices, max_rank)
    for slot, start, stop, rank in batch.segments:
        for j in range(n_slices):
            a_j = a[slot, j * max_rank : j * max_rank + rank]
            h[start:stop, j, :rank] = x[start:stop].float() @ a_j.float().T
    return h


def lora_expand(h: Tensor, b: Sequence[Tensor], y: Tensor, offsets: Sequence[int], batch: LoRABatch) -> None:
    """``y[t, offsets[j]:] += B[j][slot(t)] h[t, j]``; see :class:`LoRABackend`."""
    for slot, start, stop, rank in batch.segments:
        for j, (b_j, offset) in enumerate(zip(b, offsets, strict=True)):
            delta = h[start:stop, j, :rank].float() @ b_j[slot, :, :rank].float().T
            y_j = y[start:stop, offset : offset + b_j.shape[1]]
            y_j.copy_(y_j.float() + delta)


def lora_affine(y: Tensor, affine: Sequence[Tensor], offsets: Sequence[int], batch: LoRABatch) -> None:
    """``y[t, offsets[j]:] += gain * y[t, ...] + shift``; see :class:`LoRABackend`."""
    for slot, start, stop, _ in batch.affine:
        for affine_j, offset in zip(affine, offsets, strict=True):
            gain, shift = affine_j[slot].float()
            y_j = y[start:stop, offset : offset + len(gain)]
            y_j.copy_(y_j.float() + gain * y_j.float() + shift)


def lora_embed(token_ids: Tensor, a: Tensor, batch: LoRABatch) -> Tensor:
    """``h[t, 0] = A[slot(t)][:, token_ids[t]]``; see :class:`LoRABackend`."""
    h = a.new_zeros(len(token_ids), 1, a.shape[1])
    for slot, start, stop, rank in batch.segments:
        h[start:stop, 0, :rank] = a[slot, :rank, token_ids[start:stop]].T
    return h
