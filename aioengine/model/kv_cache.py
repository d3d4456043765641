"""The paged KV cache: after PagedAttention, Kwon et al., 2023, https://arxiv.org/abs/2309.06180."""

from __future__ import annotations

import math

import torch

from aioengine.model.buffer import Arena
from aioengine.model.spec import INT8_SCALE_BYTES, ModelSpec


class KVCache:
    """Per layer, keys and values as ``[num_blocks, block_size, heads, dim]``, by :meth:`ModelSpec.kv_shapes`.

    Stored as "int8" it is ``[num_blocks, block_size, heads, dim + 2]`` bytes: the last two are a scale. As
    "fp8" it is a byte (uint8) for each element: float8 (e4m3fn) without scales.

    Position p of a sequence is in block ``block_table[p // block_size]``. How a block is laid out inside is
    up to the kernels: see :class:`aioengine.kernels.Backend`.
    """

    def __init__(
        self,
        spec: ModelSpec,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        stored_as: str = "auto",
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.int8 = stored_as == "int8"
        extra = INT8_SCALE_BYTES if self.int8 else 0
        dtype = torch.int8 if self.int8 else torch.uint8 if stored_as == "fp8" else dtype
        shapes = [
            (num_blocks, block_size, heads, dim + extra)
            for layer in spec.kv_shapes()
            for heads, dim in (layer[:2], layer[2:])
        ]
        take = Arena(device).take
        tensors = [take(math.prod(shape) * dtype.itemsize).view(dtype).view(shape) for shape in shapes]
        self.k, self.v = tensors[::2], tensors[1::2]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.k, *self.v))
