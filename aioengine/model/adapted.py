"""Linears with each token's adapter, over the shares that the ranks of a group hold.

What is split over its inputs gives a summand of the outputs: base and adapter's are added before the one
all-reduce that the base model needs anyway. By default that is the only exchange: ``B (sum of A_i x_i)`` is
the sum of ``B (A_i x_i)``. Fully sharded, A's outputs are exchanged, which are as long as the adapters'
ranks.
"""

from __future__ import annotations

from torch import Tensor

from aioengine.kernels import Backend, LoRABatch, LoRAPool, Weight
from aioengine.model.linear import Linear
from aioengine.model.parallel.group import Group


class AdaptedLinears:
    """Linears of one rank with the adapters on them; it exchanges with other ranks where the result needs
    them."""

    def __init__(self, kernels: Backend, group: Group) -> None:
        self._kernels = kernels
        self.group = group
        self._parallel = group.shard.size > 1
        self.exchanges = self._parallel and group.shard.fully_sharded
        """Whether the ranks exchange A's outputs."""

    def split_outputs(self, linear: Linear, x: Tensor, pool: LoRAPool | None, batch: LoRABatch) -> Tensor:
        """Return the rank's outputs of a linear that is split over its outputs: [T, in] -> [T, out]."""
        y = self._kernels.linear(x, linear.weight, linear.bias)
        self.adapt_outputs(x, y, pool, batch)
        return y

    def adapt_outputs(self, x: Tensor, y: Tensor, pool: LoRAPool | None, batch: LoRABatch) -> None:
        """Apply the adapters to ``y``, the rank's outputs of a linear that is split over its outputs."""
        if pool is None or not batch.segments:
            return
        h = self._kernels.lora_shrink(x, pool, batch)
        if self.exchanges:
            h = self.gather(h, batch)
        self._kernels.lora_expand(h, pool, y, batch)
        self._affine(y, pool, batch)

    def split_inputs(self, linear: Linear, x: Tensor, pool: LoRAPool | None, batch: LoRABatch) -> Tensor:
        """Return all outputs of a linear that is split over its inputs: [T, the rank's inputs] -> [T,
        out]."""
        y = self._kernels.linear(x, linear.weight, self.own_bias(linear))
        self._adapt_inputs(x, y, pool, batch)
        return self.total(y, pool, batch)

    def own_bias(self, linear: Linear) -> Tensor | None:
        """Return the bias that the rank adds to its summand; only one rank has one."""
        return linear.bias if self.group.shard.rank == 0 else None

    def adapt_summand(self, x: Tensor, y: Tensor, pool: LoRAPool | None, batch: LoRABatch) -> None:
        """Apply the adapters to ``y``, the rank's summand of outputs that are added up over the ranks later.
        One rank alone has their shifts."""
        self._adapt_inputs(x, y, pool, batch)
        if pool is not None:
            self._affine(y, pool, batch)

    def embed(
        self,
        token_ids: Tensor,
        weight: Weight,
        first: int,
        pool: LoRAPool | None,
        batch: LoRABatch,
    ) -> Tensor:
        """Return the embeddings [T, hidden] of ``token_ids`` [T]; ``weight`` begins with the token
        ``first``."""
        absent: Tensor | None = None
        if self._parallel:
            token_ids = token_ids - first
            absent = (token_ids < 0) | (token_ids >= weight.n)
            token_ids = token_ids.masked_fill(absent, 0)
        hidden = weight.gather(token_ids)
        if absent is not None:
            hidden.masked_fill_(absent[:, None], 0)
        if pool is not None and batch.segments:
            h = self._kernels.lora_embed(token_ids, pool, batch).to(hidden.dtype)
            if absent is not None:
                h.masked_fill_(absent[:, None, None], 0)
            self._add_summand(h, pool, hidden, batch)
        return self.total(hidden, pool, batch)

    def _adapt_inputs(self, x: Tensor, y: Tensor, pool: LoRAPool | None, batch: LoRABatch) -> None:
        """Add B A x to the rank's summand ``y``; gain and shift are left out."""
        if pool is not None and batch.segments:
            self._add_summand(self._kernels.lora_shrink(x, pool, batch), pool, y, batch)

    def _add_summand(self, h: Tensor, pool: LoRAPool, y: Tensor, batch: LoRABatch) -> None:
        """Add B h to y, which is yet to be summed over the ranks."""
        if self.exchanges:
            self.sum(h, batch)
        self._kernels.lora_expand(h, pool, y, batch)

    def total(self, y: Tensor, pool: LoRAPool | None, batch: LoRABatch) -> Tensor:
        """Add up the ranks' ``y`` [T, out], in place; then apply gain and shift."""
        if self._parallel:
            self.group.all_reduce(y)
        if pool is not None:
            self._affine(y, pool, batch)
        return y

    def sum(self, h: Tensor, batch: LoRABatch) -> None:
        """Add up A's outputs [T, n, width], in place, as long as the largest rank in the batch."""
        first, rank = batch.segments[0].start, max(segment.rank for segment in batch.segments)
        h[first:, :, :rank] = self.group.all_reduce(h[first:, :, :rank].contiguous())

    def _affine(self, y: Tensor, pool: LoRAPool, batch: LoRABatch) -> None:
        if batch.affine:
            self._kernels.lora_affine(y, pool, batch)

    def gather(self, h: Tensor, batch: LoRABatch) -> Tensor:
        """Return all of A's outputs [T, n, width] from what this rank has of them: its rows of A come
        first."""
        first, size = batch.segments[0].start, self.group.shard.size
        held = -(-max(segment.rank for segment in batch.segments) // size)
        # Row i of A is row i // size on rank i % size, so that the last axis becomes the rows' order.
        dealt = self.group.all_gather(h[first:, :, :held, None].contiguous()).flatten(2)
        whole = h.new_zeros(h.shape)
        columns = min(dealt.shape[2], h.shape[2])  # beyond the largest rank there are only zeros
        whole[first:, :, :columns] = dealt[:, :, :columns]
        return whole
