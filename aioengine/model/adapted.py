"""Linears with each token's adapter, over the shares that the ranks of a group hold.

What is split over its inputs gives a summand of the outputs: base and adapter's are added before the one
all-reduce that the base model needs anyway. By default that takes no more: ``B (sum of A_i x_i)`` is the sum
of ``B (A_i x_i)``. Fully sharded, A's outputs are exchanged, which are as long as the adapters' ranks.
"""

from __future__ import annotations

from torch import Tensor

from aioengine.kernels import Backend, LoRABatch, Weight
from aioengine.model.linear import Linear
from aioengine.model.parallel.group import Group
from aioengine.model.slots.pool import FusedLoRA


class AdaptedLinears:
    """How a rank applies linears and adapters, with the other ranks where they are needed."""

    def __init__(self, kernels: Backend, group: Group) -> None:
        self._kernels = kernels
        self._group = group
        self._parallel = group.shard.size > 1
        self.exchanges = self._parallel and group.shard.fully_sharded
        """Whether the ranks exchange A's outputs."""

    def split_outputs(self, linear: Linear, x: Tensor, pool: FusedLoRA | None, batch: LoRABatch) -> Tensor:
        """The rank's outputs of a linear that is split over its outputs: [T, in] -> [T, out]."""
        y = self._kernels.linear(x, linear.weight, linear.bias)
        if pool is not None and batch.segments:
            n = len(pool.modules)
            h = self._kernels.lora_shrink(x, pool.a, self.held(batch), n)
            if self.exchanges:
                h = self.gather(h, pool, batch)
            self._kernels.lora_expand(h, pool.b, y, pool.b_offsets, batch)
            self._affine(y, pool, batch)
        return y

    def split_inputs(self, linear: Linear, x: Tensor, pool: FusedLoRA | None, batch: LoRABatch) -> Tensor:
        """All outputs of a linear that is split over its inputs: [T, the rank's inputs] -> [T, out]."""
        y = self._kernels.linear(x, linear.weight, None if self._parallel else linear.bias)
        if pool is not None and batch.segments:
            h = self._kernels.lora_shrink(x, pool.a, batch, len(pool.modules))
            self._add_summand(h, pool, y, batch)
        return self.total(y, linear.bias if self._parallel else None, pool, batch)

    def embed(
        self,
        token_ids: Tensor,
        weight: Weight,
        first: int,
        pool: FusedLoRA | None,
        batch: LoRABatch,
    ) -> Tensor:
        """The embeddings [T, hidden] of ``token_ids`` [T]; ``weight`` begins with the token ``first``."""
        absent: Tensor | None = None
        if self._parallel:
            token_ids = token_ids - first
            absent = (token_ids < 0) | (token_ids >= weight.n)
            token_ids = token_ids.masked_fill(absent, 0)
        hidden = weight.gather(token_ids)
        if absent is not None:
            hidden.masked_fill_(absent[:, None], 0)
        if pool is not None and batch.segments:
            h = self._kernels.lora_embed(token_ids, pool.a, batch).to(hidden.dtype)
            if absent is not None:
                h.masked_fill_(absent[:, None, None], 0)
            self._add_summand(h, pool, hidden, batch)
        return self.total(hidden, None, pool, batch)

    def _add_summand(self, h: Tensor, pool: FusedLoRA, y: Tensor, batch: LoRABatch) -> None:
        """Adds B h to y, which is yet to be summed over the ranks."""
        if self.exchanges:
            self.sum(h, batch)
        self._kernels.lora_expand(h, pool.b, y, pool.b_offsets, batch)

    def total(self, y: Tensor, bias: Tensor | None, pool: FusedLoRA | None, batch: LoRABatch) -> Tensor:
        """Adds up the ranks' ``y`` [T, out], in place, and does what is done to whole outputs."""
        if self._parallel:
            self._group.all_reduce(y)
        if bias is not None:
            y += bias
        if pool is not None:
            self._affine(y, pool, batch)
        return y

    def sum(self, h: Tensor, batch: LoRABatch) -> None:
        """Adds up A's outputs [T, n, R], in place, as long as the largest rank in the batch."""
        first, rank = batch.segments[0].start, max(segment.rank for segment in batch.segments)
        h[first:, :, :rank] = self._group.all_reduce(h[first:, :, :rank].contiguous())

    def _affine(self, y: Tensor, pool: FusedLoRA, batch: LoRABatch) -> None:
        if batch.affine:
            self._kernels.lora_affine(y, pool.affine, pool.offsets, batch)

    def held(self, batch: LoRABatch) -> LoRABatch:
        """The batch with the rows of A that are held here as ranks, of linears split over their outputs."""
        return batch.derive(self._held) if self.exchanges and batch.segments else batch

    def _held(self, batch: LoRABatch) -> LoRABatch:
        segments, size = batch.segments, self._group.shard.size
        ranks = [0] * (segments[-1].slot + 1)
        for segment in segments:
            ranks[segment.slot] = -(-segment.rank // size)
        slots = [-1, *(segment.slot for segment in segments)]
        counts = [segments[0].start, *(segment.stop - segment.start for segment in segments)]
        return LoRABatch(slots, counts, ranks, batch.device)

    def gather(self, h: Tensor, pool: FusedLoRA, batch: LoRABatch) -> Tensor:
        """All of A's outputs [T, n, R] from the rank's share of them [T, n, R / size]."""
        held = self.held(batch)
        first, rank = held.segments[0].start, max(segment.rank for segment in held.segments)
        # Row i of A is row i // size on rank i % size, so that the last axis becomes the rows' order.
        dealt = self._group.all_gather(h[first:, :, :rank, None].contiguous(), dim=-1).flatten(2)
        whole = h.new_zeros(len(h), h.shape[1], pool.b[0].shape[2])
        whole[first:, :, : dealt.shape[2]] = dealt
        return whole
