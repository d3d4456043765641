"""Adapter slots in memory: the matrices of a slot may lie anywhere, and a table says where.

An adapter takes only as much as its own modules, layers and ranks need. So there is no padding, and no
operation reads or multiplies padding.

The memory has the model's dtype, or int8. With int8, A and B are whole numbers, with one scale in float32 for
each rank: the scale of a row of A times that of the matching column of B.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

PANEL = 16
"""Outputs of B that are turned together: element r of output i lies where, seen as [rank / lane, 16, lane],
[r // lane, i, r % lane] is."""
LANE_BYTES = 4
"""Elements of a lane together."""
ALIGNMENT = 16
"""Number of elements. Where all matrices begin at multiples of this, GPU kernels load whole vectors."""


class Column(IntEnum):
    """Columns of the table for a place: offsets into the memory in elements, and ranks."""

    A = 0
    """Offset of A [a_rank, in]."""
    A_RANK = 1
    """Rows of A; 0: the adapter does not target the module."""
    B = 2
    """Offset of B [out, b_rank]."""
    B_RANK = 3
    """Columns of B. More than A's rows where other ranks of the group have the rest of A's rows."""
    AFFINE = 4
    """Offset of gain and shift [2, out]; below 0 if there are none."""
    SCALE = 5
    """Offset of the scales of A's rows [a_rank], float32; below 0 if the matrices are not int8."""


OFFSETS = [Column.A, Column.B, Column.AFFINE, Column.SCALE]


class Where(NamedTuple):
    """A row of the table, by :class:`Column`."""

    a: int
    a_rank: int
    b: int
    b_rank: int
    affine: int
    scale: int


class SlotMemory:
    """The memory of all slots, and the table of where each slot's places are in it.

    A place is one module of one layer; those of a fused linear follow each other. ``aligned``: every offset
    is a multiple of ``ALIGNMENT``, which is required if the memory is int8. ``dtype`` is then the dtype of
    gains and shifts (otherwise that of the memory). ``turned``: matrices B are as the CPU library multiplies
    them, which is for whoever writes them to see to (:meth:`turn`).
    """

    def __init__(
        self,
        memory: Tensor,
        num_slots: int,
        num_places: int,
        max_rank: int,
        *,
        aligned: bool = False,
        dtype: torch.dtype | None = None,
        turned: bool = False,
    ) -> None:
        self.turned = turned
        self.memory = memory
        """[elements]"""
        self.int8 = memory.dtype == torch.int8
        self.dtype = dtype if self.int8 and dtype is not None else memory.dtype
        """dtype of gains and shifts, and of everything else unless the memory is int8."""
        self.per_slot = num_places
        """Places of a slot."""
        self.max_rank = max_rank
        self.is_by_place = False
        """Whether it is what :meth:`by_place` returns."""
        self.unit = ALIGNMENT if aligned else 1
        """Elements that an offset of ``device_table`` counts."""
        self.table = torch.zeros(num_slots, num_places, len(Column), dtype=torch.int64)
        """[S, places, columns] on the host, in elements."""
        self.device_table = self.table
        """The same on the memory's device, offsets in ``unit``."""
        if memory.device.type != "cpu" or aligned:
            self.device_table = torch.zeros_like(self.table, device=memory.device)

    def floats(self, dtype: torch.dtype) -> Tensor:
        """Return the memory as elements of ``dtype`` if it is int8, else unchanged."""
        if not self.int8:
            return self.memory
        return self.memory[: len(self.memory) // dtype.itemsize * dtype.itemsize].view(dtype)

    @property
    def num_places(self) -> int:
        return self.table.shape[1]

    def by_place(self) -> SlotMemory:
        """Return the same memory with every place of every slot as a slot of one place, for operations that
        begin at a place of their own in each segment. What is written here is seen there."""
        found = copy.copy(self)
        found.is_by_place = True
        found.per_slot = self.num_places
        found.table = self.table.view(-1, 1, len(Column))
        found.device_table = found.table
        if self.device_table is not self.table:
            found.device_table = self.device_table.view(-1, 1, len(Column))
        return found

    def where(self, slot: int, place: int) -> Where:
        """Return where place ``place`` of a slot is, counted from the slot's first."""
        return Where(*self.table.view(-1, len(Column))[slot * self.num_places + place].tolist())

    def rows(self, table: Tensor, begin: int) -> tuple[Tensor, Tensor]:
        """Return the rows [places, columns] of a slot whose adapter begins at element ``begin``, for
        ``table`` and ``device_table``. The given ``table`` [places, columns] has offsets from ``begin``."""
        rows = table.clone()
        offsets = rows[:, OFFSETS]
        rows[:, OFFSETS] = torch.where(offsets < 0, offsets, offsets + begin)
        if self.device_table is self.table:
            return rows, rows
        offsets = rows[:, OFFSETS]
        counted = rows.clone()
        counted[:, OFFSETS] = torch.where(offsets < 0, offsets, offsets // self.unit)
        return rows, counted

    def turn(self, rows: Tensor, outputs: Sequence[int]) -> None:
        """Turn the matrices B of a slot, whose table is ``rows`` [places, columns], in the calling thread.
        They have so many ``outputs`` [places]."""
        from aioengine.kernels.cpu.shared_library import load  # a GPU's machine needs no compiler

        matrices = torch.stack([rows[:, Column.B], torch.tensor(outputs), rows[:, Column.B_RANK]], dim=1)
        load().aio_turn(self.memory.data_ptr(), self.memory.itemsize, matrices.data_ptr(), len(matrices))


class LoRAPool(NamedTuple):
    """Memory of all slots for one fused linear, or an embedding: n slices, each of which is a place."""

    slots: SlotMemory
    modules: tuple[str, ...]
    first: int
    """The place of the first slice; the others follow."""
    in_features: int
    widths: tuple[int, ...]
    """Rows of each slice's B."""
    b_offsets: tuple[int, ...]
    """First output column of the fused linear that each B adds to."""
    affine_widths: tuple[int, ...]
    """Number of outputs of each slice with gain and shift: the same as B's rows, unless B is a share."""
    offsets: tuple[int, ...]
    """First output column of each slice in the fused linear."""

    def where(self, slot: int, j: int) -> Where:
        """Return where slice ``j`` of a slot's adapter lies."""
        return self.slots.where(slot, self.first + j)

    def a(self, slot: int, j: int, columns: Tensor | slice = slice(None)) -> Tensor:
        """[a_rank, in], or some columns of it. A view; where the matrices are int8, a copy in float32."""
        where = self.where(slot, j)
        a = self._view(where.a, where.a_rank, self.in_features)[:, columns]
        if not self.slots.int8 or where.a_rank == 0:
            return a
        scale = self.slots.memory[where.scale :][: 4 * where.a_rank].view(torch.float32)
        return a.float() * scale[:, None]

    def b(self, slot: int, j: int) -> Tensor:
        """[out, b_rank], a view, or a copy if it is turned. Whole numbers where the matrices are int8, whose
        scales are A's."""
        where = self.where(slot, j)
        b, rank = self._view(where.b, self.widths[j], where.b_rank), where.b_rank
        lane, whole = LANE_BYTES // b.itemsize, len(b) // PANEL * PANEL
        if not self.slots.turned or rank % lane or not whole:
            return b
        panels = b[:whole].reshape(whole // PANEL, rank // lane, PANEL, lane).transpose(1, 2)
        return torch.cat([panels.reshape(whole, rank), b[whole:]])

    def affine(self, slot: int, j: int) -> Tensor | None:
        """[2, out], a view; None: there is neither gain nor shift."""
        begin, width = self.where(slot, j).affine, self.affine_widths[j]
        if begin < 0:
            return None
        if not self.slots.int8:
            return self._view(begin, 2, width)
        dtype = self.slots.dtype
        return self.slots.memory[begin:][: 2 * width * dtype.itemsize].view(dtype).view(2, width)

    def _view(self, begin: int, rows: int, width: int) -> Tensor:
        return self.slots.memory[begin : begin + rows * width].view(rows, width)
