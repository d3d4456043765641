"""Weights that are quantized once they are loaded: in the CPU library's forms, or in blocks, on any device.

The parameters that they replace keep their dtype and shape, and are NaN: if a module reads one by itself, the
probe finds it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from aioengine.errors import ConfigError
from aioengine.kernels import Backend, Weight
from aioengine.kernels.blocks import BlockWeight
from aioengine.kernels.cpu.blocks import PackedBlocks
from aioengine.kernels.cpu.int4 import Int4Weight
from aioengine.kernels.cpu.matrix import LibraryWeight
from aioengine.kernels.cpu.packed import PackedWeight
from aioengine.kernels.cpu.quantized import QuantizedWeight
from aioengine.kernels.cpu.shared_library import has_int8_products
from aioengine.kernels.portable.quantize import quantize
from aioengine.kernels.weight import PIECE_ELEMENTS, linear_by_rows
from aioengine.model.buffer import Arena
from aioengine.model.files.packing import Packing
from aioengine.model.generic.adapted.linears import AdaptedForward, base_weight, storable
from aioengine.model.generic.spec import GenericSpec
from aioengine.model.generic.step import Holder
from aioengine.model.spec import Quantization


class LibraryForms:
    """Makes the weights that the CPU library computes with, in one piece of memory."""

    def __init__(self, spec: GenericSpec, quantization: Quantization, dtype: torch.dtype) -> None:
        """``quantization`` is what is done to the weights that the spec does not pack already."""
        self._spec, self._dtype = spec, dtype
        self._quantized = set() if quantization == "none" else set(spec.quantizable)
        self._form = Int4Weight if quantization == "int4" else QuantizedWeight
        self.rounds = bool(self._quantized) and has_int8_products()
        """Whether activations are rounded, too."""
        sizes = [
            self._nbytes(x.name, spec.shapes[x.module].out_features, spec.shapes[x.module].in_features)
            for x in spec.linears
            if x.name not in spec.packed
        ]
        self._arena = Arena(sum(sizes), len(sizes)) if sizes else None

    def _nbytes(self, name: str, n: int, k: int) -> int:
        return self._form.packed_bytes(n, k) if name in self._quantized else n * k * self._dtype.itemsize

    def pack(self, names: Sequence[str], weights: Sequence[Tensor]) -> LibraryWeight:
        """Return the weights of linears that read the same input, one below the other, as one."""
        if names[0] in self._spec.packed:
            packings = [self._spec.packed[name] for name in names]
            blocks = [
                blocks_of(name, packing, weight, weight.device)
                for name, packing, weight in zip(names, packings, weights, strict=True)
            ]
            return PackedBlocks.pack(blocks)
        assert self._arena is not None
        n, k = sum(len(weight) for weight in weights), weights[0].shape[1]
        memory = self._arena.take(self._nbytes(names[0], n, k))
        if names[0] in self._quantized:
            return self._form.pack(torch.cat(list(weights)), memory, int8_activations=self.rounds)
        whole = memory.view(self._dtype).view(n, k)
        return PackedWeight.pack(torch.cat(list(weights), out=whole))


class BlockForward:
    """Takes the place of the forward of a linear whose weight is in blocks."""

    def __init__(self, weight: BlockWeight, bias: Tensor | None, holder: Holder, kernels: Backend) -> None:
        self.weight, self.bias = weight, bias
        self._holder, self._kernels = holder, kernels

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.weight.k)
        multiply = linear_by_rows if self._holder.expanded else self._kernels.linear
        return multiply(rows, self.weight, self.bias).view(*x.shape[:-1], self.weight.n)


class Blocks:
    """Linears whose weights are in blocks, by name."""

    def __init__(
        self,
        model: Any,
        spec: GenericSpec,
        hooks: Sequence[AdaptedForward],
        holder: Holder,
        kernels: Backend,
        device: torch.device,
    ) -> None:
        """Quantize the weights of ``model``, one after the other, onto ``device``, and move the rest."""
        modules: dict[str, Any] = dict(model.named_modules())
        can, by_name = storable(modules), {hook.name: hook for hook in hooks}
        self.by_name: dict[str, BlockForward] = {}
        shown: dict[str, Tensor] = {}
        for name, packing in spec.packed.items():
            module = modules[name]
            values, bias = base_weight(module)
            weight = blocks_of(name, packing, values, device)
            forward = BlockForward(weight, None if bias is None else bias.to(device), holder, kernels)
            if name in by_name:
                by_name[name].inner = forward
            else:
                module.forward = forward
            for embedding in can.get(name, ()):
                embedding.forward = functools.partial(embed, weight)
            shown[name] = stub(module.weight.data, device)
            module.weight.data = values.new_empty(0)
            self.by_name[name] = forward
        model.to(device)
        for name, tensor in shown.items():
            modules[name].weight.data = tensor

    @property
    def nbytes_added(self) -> int:
        """Bytes that the weights take more than before; below zero if they take fewer."""
        weights = [forward.weight for forward in self.by_name.values()]
        return sum(weight.nbytes - weight.n * weight.k * weight.dtype.itemsize for weight in weights)


def blocks_of(name: str, packing: Packing, weight: Tensor, device: torch.device) -> BlockWeight:
    """Quantize ``weight`` [n, k] onto ``device``, some rows at a time. Raises ConfigError if a value is not
    finite."""
    k = weight.shape[1]
    group = packing.group or k
    made: list[Mapping[str, Tensor]] = [
        quantize(packing.format, rows.to(device).float(), group)
        for rows in torch.split(weight, max(1, PIECE_ELEMENTS // k))
    ]
    tensors = {key: torch.cat([piece[key] for piece in made]) for key in made[0]}
    if not bool(tensors["scale"].isfinite().all()):
        raise ConfigError(f"{name}.weight: a value is not finite; the checkpoint is damaged")
    return BlockWeight(
        packing.format,
        k=k,
        dtype=weight.dtype,
        group=group,
        middle=packing.middle,
        rounds=packing.rounds,
        **tensors,
    )


def embed(weight: Weight, token_ids: Tensor) -> Tensor:
    """Do what an embedding with this weight does."""
    return weight.gather(token_ids.flatten().long().contiguous()).view(*token_ids.shape, weight.k)


def stub(weight: Tensor, device: torch.device | None = None) -> Tensor:
    """Return NaNs of the dtype and shape of ``weight``, almost without memory."""
    return torch.full((), torch.nan, dtype=weight.dtype, device=device).expand(weight.shape)
