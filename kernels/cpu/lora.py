"""The LoRA operations of the CPU library; see :class:`Backend`.

Plain torch does the rare cases (float16, LoRA on embeddings).
"""

from __future__ import annotations

import functools
from ctypes import Array, byref

from torch import Tensor

from aioengine.kernels.cpu import structs
from aioengine.kernels.cpu.cores import threads
from aioengine.kernels.cpu.packed import DTYPES, is_bf16
from aioengine.kernels.cpu.shared_library import load
from aioengine.kernels.plan.lora import LoRABatch, segment_table
from aioengine.kernels.portable import grouped
from aioengine.kernels.portable.grouped import lora_embed as lora_embed
from aioengine.kernels.slots import LoRAPool, SlotMemory


def lora_shrink(x: Tensor, pool: LoRAPool, batch: LoRABatch) -> Tensor:
    """``h[t, j] = A[slot(t), j] x[t]``; see :class:`Backend`."""
    if not _ours(pool, x):
        return grouped.lora_shrink(x, pool, batch)
    h = x.new_zeros(len(x), len(pool.modules), batch.width)
    if batch.segments:
        table, slots = batch.derive(segments_of), slots_struct(pool.slots)
        load().aio_lora_shrink(
            *(
                is_bf16(x),
                x.data_ptr(),
                x.stride(0),
                byref(slots),
                pool.first,
                h.data_ptr(),
                pool.in_features,
            ),
            *(len(pool.modules), batch.width, table.data_ptr(), len(table), threads()),
        )
    return h


def lora_expand(h: Tensor, pool: LoRAPool, y: Tensor, batch: LoRABatch) -> None:
    """``y[t, b_offsets[j]:] += B[j][slot(t)] h[t, j]``; see :class:`Backend`."""
    if not _ours(pool, h, y):
        return grouped.lora_expand(h, pool, y, batch)
    if not batch.segments:
        return
    h = h.contiguous()
    table, slots = batch.derive(segments_of), slots_struct(pool.slots)
    slices = slices_struct(pool.widths, pool.b_offsets)
    load().aio_lora_expand(
        *(is_bf16(y), h.data_ptr(), byref(slots), pool.first, slices, len(slices), batch.width),
        *(y.data_ptr(), y.stride(0), table.data_ptr(), len(table), threads()),
    )


def lora_affine(y: Tensor, pool: LoRAPool, batch: LoRABatch) -> None:
    """``y[t, offsets[j]:] += gain * y[t, ...] + shift``; see :class:`Backend`."""
    if not _ours(pool, y):
        return grouped.lora_affine(y, pool, batch)
    if not batch.affine:
        return
    table, slots = batch.derive(affine_of), slots_struct(pool.slots)
    slices = slices_struct(pool.affine_widths, pool.offsets)
    load().aio_lora_affine(
        *(is_bf16(y), y.data_ptr(), y.stride(0), byref(slots), pool.first, slices, len(slices)),
        *(table.data_ptr(), len(table), threads()),
    )


def segments_of(batch: LoRABatch) -> Tensor:
    """:func:`segment_table` of all segments."""
    return segment_table(batch.segments)


def affine_of(batch: LoRABatch) -> Tensor:
    """:func:`segment_table` of those that are scaled or shifted."""
    return segment_table(batch.affine)


def slots_struct(slots: SlotMemory) -> structs.Slots:
    """Make the C structure, which points to the memory and does not keep it alive."""
    fields = slots.num_places, slots.int8, slots.turned
    return structs.Slots(slots.memory.data_ptr(), slots.table.data_ptr(), *fields)


@functools.lru_cache(maxsize=256)
def slices_struct(widths: tuple[int, ...], offsets: tuple[int, ...]) -> Array[structs.LoraSlice]:
    """Make the C structures of a pool's slices, which are not to be changed."""
    pairs = zip(widths, offsets, strict=True)
    return (structs.LoraSlice * len(widths))(*(structs.LoraSlice(*pair) for pair in pairs))


def _ours(pool: LoRAPool, *tensors: Tensor) -> bool:
    """Whether the library supports these tensors: all of one of its two dtypes."""
    dtype = pool.slots.dtype
    return dtype in DTYPES and all(t.dtype == dtype and t.stride(-1) == 1 for t in tensors)
