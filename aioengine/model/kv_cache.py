"""The paged KV cache: after PagedAttention, Kwon et al., 2023, https://arxiv.org/abs/2309.06180."""

from __future__ import annotations

import math

import torch

from aioengine.model.buffer import Arena
from aioengine.model.spec import ModelSpec


class KVCache:
    """Per layer, keys and values as ``[num_blocks, block_size, kv_heads, head_dim]``.

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
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        shape = (num_blocks, block_size, spec.num_kv_heads, spec.head_dim)

        if device.type == "cpu":
            size, count = math.prod(shape) * dtype.itemsize, 2 * spec.num_layers
            arena = Arena(count * size, count)
            tensors = [arena.take(size).view(dtype).view(shape) for _ in range(count)]
        else:
            tensors = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(2 * spec.num_layers)]
        self.k, self.v = tensors[::2], tensors[1::2]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.k, *self.v))
