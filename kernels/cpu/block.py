"""Layers of attention and a gated MLP, with the adapters on them, in one call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from aioengine.kernels.backend import HeadNorms, LayerCache, Norm, Rotation, Scores
from aioengine.kernels.cpu import structs
from aioengine.kernels.cpu.adapted import AdaptedLinear
from aioengine.kernels.cpu.layer import head_norms_struct
from aioengine.kernels.cpu.packed import is_bf16, pointer
from aioengine.kernels.cpu.shared_library import load, threads
from aioengine.kernels.plan.attention import AttentionPlan
from aioengine.kernels.plan.lora import LoRABatch


@dataclass(frozen=True, kw_only=True, eq=False)
class Parts:
    """What a layer consists of. The norms have one epsilon and one offset."""

    qkv: AdaptedLinear
    o: AdaptedLinear
    gate_up: AdaptedLinear
    down: AdaptedLinear
    input_norm: Norm | None
    attention_norm: Norm | None
    """Of what attention gives, before it is added to the hidden state."""
    mlp_input_norm: Norm | None
    mlp_norm: Norm | None
    """Of what the MLP gives."""
    head_norms: HeadNorms | None
    heads: int
    cache: LayerCache
    scores: Scores
    half: int
    neighbours: bool
    activation: Literal["silu", "gelu_tanh"]
    residual_scale: float = 1.0
    """Factor of what is added to the hidden state."""

    @property
    def head_dim(self) -> int:
        return self.cache.keys.shape[3]

    @property
    def fit(self) -> bool:
        """Whether the sizes fit each other, and all norms are of one kind."""
        size, (_, _, kv_heads, d) = self.down.weight.n, self.cache.keys.shape
        norms = [norm for norm in self._norms.values() if norm is not None]
        return (
            len({norm[1:] for norm in norms}) == 1
            and all(len(norm.weight) == size for norm in norms)
            and self.qkv.weight.k == self.gate_up.weight.k == self.o.weight.n == size
            and self.qkv.weight.n == (self.heads + 2 * kv_heads) * d
            and self.o.weight.k == self.heads * d
            and self.gate_up.weight.n == 2 * self.down.weight.k
        )

    @property
    def _norms(self) -> dict[str, Norm | None]:
        names = ("input_norm", "attention_norm", "mlp_input_norm", "mlp_norm")
        return {name: getattr(self, name) for name in names}

    def struct(self, *, adapted: bool) -> structs.Block:
        """Make the C structure, which does not keep the memory alive, with adapters or without."""
        _, eps, offset = next(norm for norm in self._norms.values() if norm is not None)
        window, scale, soft_cap, sinks = self.scores
        keys, values = self.cache
        _, block_size, kv_heads, d = keys.shape
        linears = {name: getattr(self, name) for name in ("qkv", "o", "gate_up", "down")}
        return structs.Block(
            **{
                name: ctypes.pointer(linear.with_adapters if adapted else linear.base)
                for name, linear in linears.items()
            },
            **{name: None if norm is None else norm.weight.data_ptr() for name, norm in self._norms.items()},
            sinks=pointer(sinks),
            head_norms=None
            if self.head_norms is None
            else ctypes.pointer(head_norms_struct(self.head_norms)),
            keys=keys.data_ptr(),
            values=values.data_ptr(),
            size=self.down.weight.n,
            heads=self.heads,
            kv_heads=kv_heads,
            head_dim=d,
            block_size=block_size,
            block_bytes=keys.stride(0) * keys.itemsize,
            half=self.half,
            neighbours=self.neighbours,
            window=window or 0,
            gelu=self.activation == "gelu_tanh",
            norm_rounded=offset is None,
            eps=eps,
            norm_offset=offset or 0.0,
            residual_scale=self.residual_scale,
            attention_scale=d**-0.5 if scale is None else scale,
            soft_cap=soft_cap or 0.0,
        )


class Scratch:
    """Memory that the layers of a step use one after the other, and where its tokens are."""

    def __init__(self, blocks: Blocks, plan: AttentionPlan, batch: LoRABatch) -> None:
        tokens, dtype = len(plan.positions), blocks.dtype
        self._sizes = size, wide, narrow, slices = blocks.sizes
        self.h = torch.empty(tokens, slices * batch.width, dtype=dtype)
        self._plan = plan
        self._all = [torch.empty(tokens, width, dtype=dtype) for width in (size, wide, narrow)]
        x, of_wide, of_narrow = (tensor.data_ptr() for tensor in self._all)
        self.step = structs.BlockStep(
            *(x, of_wide, of_narrow, plan.cells.data_ptr(), plan.last.data_ptr(), plan.tables.data_ptr()),
            *(plan.span_table.data_ptr(), tokens, plan.tables.shape[1], len(plan.spans)),
        )

    def has_room(self, blocks: Blocks) -> bool:
        """Whether it is large enough for these."""
        return all(a <= b for a, b in zip(blocks.sizes, self._sizes, strict=True))


class Blocks:
    """Computes layers, one after the other, with one rotation, in one call."""

    def __init__(self, layers: Sequence[Parts]) -> None:
        self.layers = layers
        self.dtype = layers[0].qkv.weight.dtype
        self._linears = [one for parts in layers for one in (parts.qkv, parts.o, parts.gate_up, parts.down)]
        self.sizes = (
            layers[0].down.weight.n,
            max(max(parts.qkv.weight.n, parts.gate_up.weight.n) for parts in layers),
            max(max(parts.o.weight.k, parts.down.weight.k) for parts in layers),
            max(linear.slices for linear in self._linears),
        )
        """What a :class:`Scratch` has for each token."""
        self._made: list[structs.Block] = []
        self._structs = [self._pointers(adapted=adapted) for adapted in (False, True)]

    def _pointers(self, *, adapted: bool) -> ctypes.Array[Any]:
        made = [parts.struct(adapted=adapted) for parts in self.layers]
        for one, following in pairwise(made):
            one.next = following.qkv
        self._made += made  # pointers may not keep them alive
        return (ctypes.POINTER(structs.Block) * len(made))(*map(ctypes.pointer, made))

    def __call__(self, x: Tensor, rotation: Rotation, scratch: Scratch, batch: LoRABatch) -> Tensor:
        """Return what each layer makes of ``x`` [T, size], contiguous: [layers, T, size]. Not for several
        threads at once."""
        cos, sin, _ = rotation
        adapted = bool(batch.segments)
        if adapted:
            for linear in self._linears:
                linear.prepare(batch, scratch.h)
        out = x.new_empty(len(self.layers), *x.shape)
        load().aio_blocks(
            *(is_bf16(x), self._structs[adapted], len(self.layers), ctypes.byref(scratch.step)),
            *(x.data_ptr(), out.data_ptr(), cos.data_ptr(), sin.data_ptr(), threads()),
        )
        return out
