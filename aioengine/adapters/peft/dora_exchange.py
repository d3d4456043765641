"""An adapter that has been read, before the tensor-parallel ranks have exchanged their parts of DoRA's
norms."""

from __future__ import annotations

import torch
from torch import Tensor

from aioengine.adapters.peft.dora import BaseWeights, Rows, rows_of
from aioengine.adapters.peft.pack import PackedAdapter
from aioengine.model.slots.image import image_shape
from aioengine.model.slots.layout import SlotLayout

_FLOAT = torch.float32.itemsize


class Draft:
    """Adapter whose DoRA norms are not known yet. Where the inputs of a linear are split, a rank has a part
    of each row of the weight, and DoRA needs the rows' norms. Each rank therefore offers the sum of squares
    of its parts and receives the sum over all ranks.

    Whatever the ranks, all draft the same rows of one adapter, in the same order.
    """

    def __init__(
        self,
        packed: PackedAdapter,
        layout: SlotLayout,
        weights: BaseWeights,
        dtype: torch.dtype,
    ) -> None:
        """``layout`` and ``dtype`` are the slots'."""
        self.packed = packed
        split, partition = layout.shard.size > 1, layout.partition
        keys = sorted(key for key in packed.magnitudes if split and partition.splits_inputs(key[1]))
        self._parts = rows_of(packed, weights, keys)
        self._sizes = [len(part.squares) for part in self._parts.values()]
        self._total = torch.zeros(sum(self._sizes))
        self._layout = layout
        self._dtype = dtype

    @property
    def nbytes(self) -> int:
        """Size of the finished adapter in bytes."""
        head = self.packed.head
        return self.slot_nbytes + (0 if head is None else head.nbytes)

    @property
    def slot_nbytes(self) -> int:
        """Bytes that the adapter takes in a slot."""
        packed = self.packed
        affine = packed.magnitudes.keys() | packed.biases.keys()
        ranks = {key: (len(a), b.shape[1]) for key, (a, b) in packed.tensors.items()}
        tokens = None if packed.tokens is None else packed.tokens.tables
        return image_shape(self._layout, ranks, affine, self._dtype, tokens).nbytes

    @property
    def squares(self) -> bytes:
        """This rank's sums, which every rank adds, this one included; empty if there is nothing to add."""
        data = bytearray(len(self._total) * _FLOAT)
        if data:
            torch.cat([part.squares for part in self._parts.values()], out=_floats(data))
        return bytes(data)

    def add(self, begin: int, squares: bytes) -> None:
        """Add a rank's ``squares`` from byte ``begin`` on. All ranks add in the same order, so their sums are
        equal bit for bit."""
        values = _floats(bytearray(squares))
        self._total[begin // _FLOAT :][: len(values)] += values

    def rows(self) -> dict[tuple[int, str], Rows]:
        """Return the complete rows by (layer, module), once every rank's part has been added."""
        totals = self._total.split_with_sizes(self._sizes)
        items = zip(self._parts.items(), totals, strict=True)
        return {key: part._replace(squares=total) for (key, part), total in items}


def _floats(data: bytearray) -> Tensor:
    return torch.frombuffer(data, dtype=torch.float32)
