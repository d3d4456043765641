"""Linears with the adapters of their tokens in one call, as the compiled step computes them."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_int64, c_long, c_void_p

import torch
from torch import Tensor

from aioengine.kernels.cpu import structs
from aioengine.kernels.cpu.lora import affine_of, segments_of, slices_struct, slots_struct
from aioengine.kernels.cpu.packed import PANEL, LibraryWeight, is_bf16
from aioengine.kernels.cpu.shared_library import load, threads
from aioengine.kernels.plan.lora import LoRABatch
from aioengine.kernels.slots import LoRAPool


class _Adapters(Structure):
    """What adapters add to a linear, from what A gave."""

    _fields_ = [
        *(("segments", c_void_p), ("count", c_long), ("h", c_void_p), ("slots", POINTER(structs.Slots))),
        *(("first", c_long), ("slice", POINTER(structs.LoraSlice)), ("slices", c_long), ("width", c_long)),
    ]


class _Beside(Structure):
    """What a linear does beside its own product."""

    _fields_ = [
        *(("fetch", c_void_p), ("fetch_count", c_long), ("adapters", POINTER(_Adapters))),
        *(("next", c_void_p), ("next_outputs", c_long), ("next_panel_bytes", c_long)),
    ]


class _Linear(Structure):
    """A linear and the adapters on it; see ``kernels/cpu/src/parts.cpp``."""

    _fields_ = [
        *(("matrix", structs.Matrix), ("beside", _Beside)),
        *(("outputs", POINTER(structs.LoraSlice)), ("affine", c_void_p), ("affine_count", c_int64)),
    ]


class AdaptedLinear:
    """``x W^T + bias``, and what the adapters in ``pool`` add to it, whose slices are whole panels."""

    def __init__(self, weight: LibraryWeight, bias: Tensor | None, pool: LoRAPool) -> None:
        assert fits(pool, weight.dtype)
        self._weight, self._bias, self._pool = weight, bias, pool  # the structures point to their memory
        self._slots = slots_struct(pool.slots)
        self._adapters = _Adapters(
            slots=ctypes.pointer(self._slots),
            first=pool.first,
            slice=slices_struct(pool.widths, pool.b_offsets),
            slices=len(pool.widths),
        )
        self._base = _Linear(matrix=weight.matrix(bias))
        self._adapted = _Linear(matrix=weight.matrix(bias))
        self._adapted.beside.adapters = ctypes.pointer(self._adapters)
        self._adapted.outputs = slices_struct(pool.affine_widths, pool.offsets)

    def __call__(self, x: Tensor, batch: LoRABatch) -> Tensor:
        """``x`` [T, in], contiguous; returns [T, out]. Not for several threads at once."""
        rows, linear = len(x), self._base
        y = torch.empty(rows, self._weight.n, dtype=x.dtype)
        h = torch.empty(rows, len(self._pool.widths) * batch.width, dtype=x.dtype)
        if batch.segments:
            linear, adapters = self._adapted, self._adapters
            adapters.segments, adapters.count = batch.derive(segments_of).data_ptr(), len(batch.segments)
            adapters.h, adapters.width = h.data_ptr(), batch.width
            linear.affine_count = len(batch.affine)
            if batch.affine:
                linear.affine = batch.derive(affine_of).data_ptr()
        load().aio_adapted_linear(
            is_bf16(x), ctypes.byref(linear), x.data_ptr(), y.data_ptr(), rows, threads()
        )
        return y


def fits(pool: LoRAPool, dtype: torch.dtype) -> bool:
    """Whether the library adds these adapters to a linear of ``dtype``."""
    columns = (*pool.widths, *pool.b_offsets)
    return pool.slots.dtype == dtype and all(column % PANEL == 0 for column in columns)
