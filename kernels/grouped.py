"""The default backend: batched matrix products over groups of segments, in plain torch, on any device.

A loop over segments from Python costs more than its arithmetic, and one product over all slots with a
mask does work for every slot that is not asked for. Here the segments of equal rank become one
``bmm``, without copies where they are adjacent and equally long, as they are in steady decoding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aioengine.kernels.batch import Group, LoRABatch

name = "torch"


def lora_shrink(x: Tensor, a: Tensor, batch: LoRABatch, n_slices: int) -> Tensor:
    """``h[t, j] = A[slot(t), j] x[t]``; see :class:`aioengine.kernels.dispatch.LoRABackend`."""
    max_rank = a.shape[1] // n_slices
    h = x.new_zeros(x.shape[0], n_slices, max_rank)
    for group in batch.groups:
        a_g = _select(a, group, x.dtype)
        if group.rank < max_rank:
            a_g = a_g.view(group.size, n_slices, max_rank, -1)[:, :, : group.rank].flatten(1, 2)
        h_g = torch.bmm(_gather(x, group), a_g.transpose(1, 2))
        h_g = h_g.view(group.size * group.length, n_slices, group.rank)
        if group.tokens is None or group.rows is None:
            h[group.start : group.start + h_g.shape[0], :, : group.rank] = h_g
        else:
            h[group.tokens, :, : group.rank] = h_g.index_select(0, group.rows)
    return h


def lora_expand(h: Tensor, b: Sequence[Tensor], y: Tensor, offsets: Sequence[int], batch: LoRABatch) -> None:
    """``y[t, offsets[j]:] += B[j][slot(t)] h[t, j]``; see :class:`LoRABackend`."""
    for group in batch.groups:
        h_g = _gather(h, group)
        for j, (b_j, offset) in enumerate(zip(b, offsets, strict=True)):
            b_g = _select(b_j, group, h.dtype)[:, :, : group.rank]
            delta = torch.bmm(h_g[:, :, j, : group.rank], b_g.transpose(1, 2)).flatten(0, 1)
            y_j = y[:, offset : offset + b_j.shape[1]]
            if group.tokens is None or group.rows is None:
                y_j[group.start : group.start + delta.shape[0]] += delta
            else:
                y_j.index_add_(0, group.tokens, delta.index_select(0, group.rows).to(y.dtype))


def _select(pool: Tensor, group: Group, dtype: torch.dtype) -> Tensor:
    """The group's slots of ``pool`` [S, ...] -> [G, ...] in ``dtype``; a view where possible."""
    if isinstance(group.slots, slice):
        return pool[group.slots].to(dtype)
    return pool.index_select(0, group.slots).to(dtype)


def _gather(rows: Tensor, group: Group) -> Tensor:
    """The group's tokens of ``rows`` [T, ...] -> [G, length, ...]."""
    if group.padded is None:
        rows = rows[group.start : group.start + group.size * group.length]
    else:
        rows = rows.index_select(0, group.padded)
    return rows.view(group.size, group.length, *rows.shape[1:])
