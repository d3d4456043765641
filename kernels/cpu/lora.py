"""The LoRA operations of the CPU library; see :class:`Backend`.

What is rare (float16, LoRA on embeddings) is left to plain torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from aioengine.kernels.cpu.packed import DTYPES, is_bf16
from aioengine.kernels.cpu.shared_library import load, threads
from aioengine.kernels.plan.lora import LoRABatch, Segment
from aioengine.kernels.portable import grouped
from aioengine.kernels.portable.grouped import lora_embed

__all__ = ["lora_affine", "lora_embed", "lora_expand", "lora_shrink"]


def lora_shrink(x: Tensor, a: Tensor, batch: LoRABatch, n_slices: int) -> Tensor:
    """``h[t, j] = A[slot(t), j] x[t]``; see :class:`Backend`."""
    if not _ours(x, a):
        return grouped.lora_shrink(x, a, batch, n_slices)
    max_rank = a.shape[1] // n_slices
    h = x.new_zeros(len(x), n_slices, max_rank)
    if batch.segments:
        table = segment_table(batch.segments)
        load().aio_lora_shrink(
            *(is_bf16(x), x.data_ptr(), x.stride(0), a.data_ptr(), h.data_ptr(), a.stride(0)),
            *(a.shape[2], n_slices, max_rank, table.data_ptr(), len(table), threads()),
        )
    return h


def lora_expand(h: Tensor, b: Sequence[Tensor], y: Tensor, offsets: Sequence[int], batch: LoRABatch) -> None:
    """``y[t, offsets[j]:] += B[j][slot(t)] h[t, j]``; see :class:`Backend`."""
    if not _ours(h, y, *b):
        return grouped.lora_expand(h, b, y, offsets, batch)
    if not batch.segments:
        return
    h = h.contiguous()
    table, slices = segment_table(batch.segments), _slices(b, [None] * len(b), offsets)
    load().aio_lora_expand(
        *(is_bf16(y), h.data_ptr(), slices.data_ptr(), len(b), h.shape[2]),
        *(y.data_ptr(), y.stride(0), table.data_ptr(), len(table), threads()),
    )


def lora_affine(y: Tensor, affine: Sequence[Tensor], offsets: Sequence[int], batch: LoRABatch) -> None:
    """``y[t, offsets[j]:] += gain * y[t, ...] + shift``; see :class:`Backend`."""
    if not _ours(y, *affine):
        return grouped.lora_affine(y, affine, offsets, batch)
    if not batch.affine:
        return
    table, slices = segment_table(batch.affine), _slices([None] * len(affine), affine, offsets)
    load().aio_lora_affine(
        *(is_bf16(y), y.data_ptr(), y.stride(0), slices.data_ptr(), len(affine)),
        *(table.data_ptr(), len(table), threads()),
    )


def segment_table(segments: Iterable[Segment]) -> Tensor:
    """[count, 4] of int32: slot, begin, end, rank."""
    return torch.tensor([tuple(segment) for segment in segments], dtype=torch.int32)


def _slices(b: Sequence[Tensor | None], affine: Sequence[Tensor | None], offsets: Sequence[int]) -> Tensor:
    """``LoraSlice`` of ``structs.py``, one row each."""
    rows = []
    for matrix, gain, offset in zip(b, affine, offsets, strict=True):
        out = matrix.shape[1] if matrix is not None else 0 if gain is None else gain.shape[2]
        rows.append([_address(matrix), _address(gain), out, offset, _stride(matrix), _stride(gain)])
    return torch.tensor(rows, dtype=torch.int64)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _stride(tensor: Tensor | None) -> int:
    """From one slot to the next."""
    return 0 if tensor is None else tensor.stride(0)


def _ours(*tensors: Tensor) -> bool:
    """Whether the library can take them: one dtype of its two, and rows that adjoin in each slot."""
    dtype = tensors[0].dtype
    return dtype in DTYPES and all(
        t.dtype == dtype and t.stride(-1) == 1 and (t.dim() < 3 or t.stride(1) == t.shape[2]) for t in tensors
    )
