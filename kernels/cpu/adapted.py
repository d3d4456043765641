"""Linears with the adapters of their tokens, and a gated MLP of two of them, each in one call."""

from __future__ import annotations

import ctypes
from typing import Any, Literal

import torch
from torch import Tensor

from aioengine.kernels.cpu import structs
from aioengine.kernels.cpu.lora import affine_of, segments_of, slices_struct, slots_struct
from aioengine.kernels.cpu.matrix import LibraryWeight, matrix_of
from aioengine.kernels.cpu.packed import PANEL, is_bf16
from aioengine.kernels.cpu.shared_library import load, threads
from aioengine.kernels.plan.lora import LoRABatch
from aioengine.kernels.slots import LoRAPool


class AdaptedLinear:
    """``x W^T + bias``, and what the adapters in ``pool`` add to it, whose slices are whole panels."""

    def __init__(self, weight: LibraryWeight, bias: Tensor | None, pool: LoRAPool | None) -> None:
        self.weight, self._bias, self._pool = weight, bias, pool  # the structures point to their memory
        self.base = structs.AdaptedLinear(matrix=matrix_of(weight, bias))
        self.with_adapters = structs.AdaptedLinear(matrix=matrix_of(weight, bias))
        """What :meth:`prepare` has filled in; the same as ``base`` if there is no pool."""
        if pool is not None:
            assert fits(pool, weight.dtype)
            self._slots = slots_struct(pool.slots)
            self._adapters = structs.Adapters(
                slots=ctypes.pointer(self._slots),
                first=pool.first,
                slice=slices_struct(pool.widths, pool.b_offsets),
                slices=len(pool.widths),
            )
            self.with_adapters.beside.adapters = ctypes.pointer(self._adapters)
            self.with_adapters.outputs = slices_struct(pool.affine_widths, pool.offsets)

    def struct(self, rows: int, batch: LoRABatch | None) -> tuple[Any, Tensor | None]:
        """Return a reference to the library's structure for ``rows`` tokens, and what must live as long as it
        is used; the next call changes it."""
        if batch is None or self._pool is None or not batch.segments:
            return ctypes.byref(self.base), None
        h = torch.empty(rows, self.slices * batch.width, dtype=self.weight.dtype)
        self.prepare(batch, h)
        return ctypes.byref(self.with_adapters), h

    @property
    def slices(self) -> int:
        """Linears that adapters may be on."""
        return 0 if self._pool is None else len(self._pool.widths)

    def prepare(self, batch: LoRABatch, h: Tensor) -> None:
        """Fill in ``with_adapters`` for a batch with adapters, with room for A's outputs, ``slices`` times
        the batch's width for each token."""
        if self._pool is None:
            return
        adapters = self._adapters
        adapters.segments, adapters.count = batch.derive(segments_of).data_ptr(), len(batch.segments)
        adapters.h, adapters.width = h.data_ptr(), batch.width
        self.with_adapters.affine_count = len(batch.affine)
        if batch.affine:
            self.with_adapters.affine = batch.derive(affine_of).data_ptr()

    def __call__(self, x: Tensor, batch: LoRABatch | None) -> Tensor:
        """``x`` [T, in], contiguous; returns [T, out]. Not for several threads at once."""
        rows = len(x)
        y = torch.empty(rows, self.weight.n, dtype=x.dtype)
        struct, _scratch = self.struct(rows, batch)
        load().aio_adapted_linear(is_bf16(x), struct, x.data_ptr(), y.data_ptr(), rows, threads())
        return y


def gated_mlp(
    gate_up: AdaptedLinear,
    down: AdaptedLinear,
    activation: Literal["silu", "gelu_tanh"],
    x: Tensor,
    batch: LoRABatch | None,
) -> Tensor:
    """``down(act(gate(x)) * up(x))`` for ``x`` [T, in], contiguous; returns [T, out]. Rounded like its three
    operations."""
    rows = len(x)
    sizes = gate_up.weight.n, down.weight.k, down.weight.n
    wide, narrow, y = (torch.empty(rows, size, dtype=x.dtype) for size in sizes)
    first, _scratch = gate_up.struct(rows, batch)
    second, _more = down.struct(rows, batch)
    load().aio_gated_mlp(
        *(is_bf16(x), first, second, activation == "gelu_tanh", x.data_ptr(), wide.data_ptr()),
        *(narrow.data_ptr(), y.data_ptr(), rows, threads()),
    )
    return y


def fits(pool: LoRAPool, dtype: torch.dtype) -> bool:
    """Whether the library adds these adapters to a linear of ``dtype``."""
    columns = (*pool.widths, *pool.b_offsets)
    return pool.slots.dtype == dtype and all(column % PANEL == 0 for column in columns)
