"""A decoder whose layers have one adapter added to their weights, beside the one without.

Both share everything but the layers' linears. The base model's weights are never written, so that a step may
use either of the two, and nothing has to be restored after a merge. The product is made beside the steps.
"""

from __future__ import annotations

import copy
import dataclasses
import time

import torch
from torch import Tensor

from aioengine.errors import EngineStopped
from aioengine.kernels import LoRAPool, MergeableWeight, SlotMemory
from aioengine.model.buffer import Arena
from aioengine.model.decoder import Decoder, Layer
from aioengine.model.linear import Linear, Mlp
from aioengine.model.slots.image import AdapterImage, serial_copies
from aioengine.model.slots.pool import LoRASlots


class MergedDecoder:
    """Second copy of the linears that adapters may target; ``merge`` adds an adapter to it.

    ``decoder`` runs on a CPU and is packed; its weights must be :class:`MergeableWeight`.
    """

    def __init__(self, decoder: Decoder, slots: LoRASlots) -> None:
        self._base, self._slots = decoder, slots
        linears = [
            (layer.linears, [name for name in layer.linears if name in pools])
            for layer, pools in zip(decoder.layers, slots.layers, strict=True)
        ]
        sizes = [found[name].weight.nbytes for found, names in linears for name in names]
        self._memory = Arena(sum(sizes), len(sizes))
        self.decoder = copy.copy(decoder)
        """The decoder with the merged weights."""
        self.decoder.layers = [
            self._layer(layer, set(names)) for layer, (_, names) in zip(decoder.layers, linears, strict=True)
        ]
        self._changed: set[tuple[int, str, int]] = set()
        """Layer, linear and slice of what is not as in the base model."""
        self._closed = False
        self.uid: int | None = None
        """Number of the adapter that is merged; None: the weights are not whole."""

    def _layer(self, layer: Layer, names: set[str]) -> Layer:
        def copied(name: str, linear: Linear) -> Linear:
            return Linear(self._copy(linear.weight), linear.bias) if name in names else linear

        mlp = layer.mlp
        assert isinstance(mlp, Mlp)
        return dataclasses.replace(
            layer,
            qkv=copied("qkv", layer.qkv),
            o=copied("o", layer.o),
            mlp=Mlp(copied("gate_up", mlp.gate_up), copied("down", mlp.down)),
        )

    def _copy(self, weight: object) -> MergeableWeight:
        assert isinstance(weight, MergeableWeight)
        found = weight.like(self._memory.take(weight.nbytes))
        found.data.copy_(weight.data)
        return found

    def merge(self, uid: int, image: AdapterImage) -> float:
        """Make the weights with this adapter; returns the seconds that it took. Blocks, and works in the
        calling thread alone where the weights are packed. No step may use the merged weights meanwhile.

        Raises EngineStopped after ``close``.
        """
        began = time.perf_counter()
        self.uid = None
        memory = SlotMemory(
            image.data, 1, len(image.table), image.layout.max_rank, dtype=self._slots.memory.dtype
        )
        memory.table[0] = image.table
        for i, pools in enumerate(self._slots.layers):
            base, merged = self._base.layers[i].linears, self.decoder.layers[i].linears
            for name, pool in pools.items():
                self._add(i, name, base[name], merged[name], pool._replace(slots=memory))
        self.uid = uid
        return time.perf_counter() - began

    def _add(self, layer: int, name: str, base: Linear, merged: Linear, pool: LoRAPool) -> None:
        weight, out = base.weight, merged.weight
        assert isinstance(weight, MergeableWeight) and isinstance(out, MergeableWeight)
        for j, first in enumerate(pool.offsets):
            if self._closed:
                raise EngineStopped("the engine was stopped before the adapter was merged")
            key, is_changed = (layer, name, j), pool.where(0, j).a_rank > 0
            if is_changed or key in self._changed:
                self._changed.add(key)
                weight.add_low_rank(out, first, _turned(pool.b(0, j)), _turned(pool.a(0, j)))
            if not is_changed:
                self._changed.discard(key)

    def close(self) -> None:
        """Have a merge that is under way end soon."""
        self._closed = True


def _turned(matrix: Tensor) -> Tensor:
    """Transpose a matrix, as float32, in the calling thread."""
    found = torch.empty(matrix.shape[::-1])
    for to, values in serial_copies(matrix.T, found):
        to.copy_(values)
    return found
