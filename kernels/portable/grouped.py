"""LoRA in plain torch, on any device: batched matrix products over groups of segments.

A loop over segments from Python costs more than its arithmetic, and one product over all slots with a
mask does work for every slot that is not asked for. Here the segments of similar rank become one
``bmm``, without copies where they adjoin and are equally long, as they are in steady decoding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from aioengine.kernels.plan.lora import Group, Grouping, LoRABatch


def lora_shrink(x: Tensor, a: Tensor, batch: LoRABatch, n_slices: int) -> Tensor:
    """``h[t, j] = A[slot(t), j] x[t]``; see :class:`aioengine.kernels.backend.Backend`."""
    max_rank = a.shape[1] // n_slices
    h = x.new_zeros(x.shape[0], n_slices, max_rank)
    if not batch.segments:
        return h
    grouping = batch.grouping
    rows = x.new_zeros(grouping.num_rows, n_slices, max_rank)
    for group, start, stop in _row_ranges(grouping):
        a_g = _select(a, group, x.dtype)
        if group.rank < max_rank:
            a_g = a_g.view(group.size, n_slices, max_rank, -1)[:, :, : group.rank].flatten(1, 2)
        h_g = torch.bmm(_gather(x, group), a_g.transpose(1, 2))
        rows[start:stop, :, : group.rank] = h_g.view(stop - start, n_slices, group.rank)
    h[grouping.first :] = _in_token_order(rows, grouping)
    return h


def lora_expand(h: Tensor, b: Sequence[Tensor], y: Tensor, offsets: Sequence[int], batch: LoRABatch) -> None:
    """``y[t, offsets[j]:] += B[j][slot(t)] h[t, j]``; see :class:`Backend`."""
    if not batch.segments:
        return
    grouping = batch.grouping
    gathered = [(_gather(h, group), group, start, stop) for group, start, stop in _row_ranges(grouping)]
    for j, (b_j, offset) in enumerate(zip(b, offsets, strict=True)):
        width = b_j.shape[1]
        delta = h.new_empty(grouping.num_rows, width)
        for h_g, group, start, stop in gathered:
            b_g = _select(b_j, group, h.dtype)[:, :, : group.rank]
            out = delta[start:stop].view(group.size, group.length, width)
            torch.bmm(h_g[:, :, j, : group.rank], b_g.transpose(1, 2), out=out)
        y[grouping.first :, offset : offset + width] += _in_token_order(delta, grouping)


def lora_affine(y: Tensor, affine: Sequence[Tensor], offsets: Sequence[int], batch: LoRABatch) -> None:
    """``y[t, offsets[j]:] += gain * y[t, ...] + shift``; see :class:`Backend`."""
    if not batch.affine:
        return
    long, tokens, slots = batch.affine_rows
    for affine_j, offset in zip(affine, offsets, strict=True):
        y_j = y[:, offset : offset + affine_j.shape[2]]
        for segment in long:
            gain, shift = affine_j[segment.slot]
            rows = y_j[segment.start : segment.stop]
            rows.copy_(_scaled(rows, gain, shift))
        if tokens is not None and slots is not None:
            gain, shift = affine_j.index_select(0, slots).unbind(1)
            y_j[tokens] = _scaled(y_j.index_select(0, tokens), gain, shift).to(y.dtype)


def _scaled(y: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """``y + gain * y + shift``, in float32 before it is rounded."""
    wide = y.float()
    return torch.addcmul(wide + shift, wide, gain.float())


def lora_embed(token_ids: Tensor, a: Tensor, batch: LoRABatch) -> Tensor:
    """``h[t, 0] = A[slot(t)][:, token_ids[t]]``; see :class:`Backend`."""
    h = a.new_zeros(len(token_ids), 1, a.shape[1])
    if batch.segments:
        first = batch.segments[0].start
        h[first:, 0] = a[batch.slot_of_token, :, token_ids[first:]]
    return h


def _row_ranges(grouping: Grouping) -> Iterator[tuple[Group, int, int]]:
    """Each group with its range of padded rows."""
    start = 0
    for group in grouping.groups:
        stop = start + group.size * group.length
        yield group, start, stop
        start = stop


def _select(pool: Tensor, group: Group, dtype: torch.dtype) -> Tensor:
    """The group's slots of ``pool`` [S, ...] -> [size, ...] in ``dtype``; a view where possible."""
    if isinstance(group.slots, slice):
        return pool[group.slots].to(dtype)
    return pool.index_select(0, group.slots).to(dtype)


def _gather(values: Tensor, group: Group) -> Tensor:
    """The group's tokens of ``values`` [T, ...] -> [size, length, ...]."""
    if group.tokens is None:
        values = values[group.start : group.start + group.size * group.length]
    else:
        values = values.index_select(0, group.tokens)
    return values.view(group.size, group.length, *values.shape[1:])


def _in_token_order(rows: Tensor, grouping: Grouping) -> Tensor:
    """Padded rows [num_rows, ...] -> one row for each token from ``grouping.first`` on."""
    return rows if grouping.order is None else rows.index_select(0, grouping.order)
