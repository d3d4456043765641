"""Exchanges between ranks, for which a compiled step calls back into Python."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from aioengine.kernels import LoRABatch, LoRAPool, Segment
from aioengine.kernels.cpu.structs import Exchange
from aioengine.model.adapted import AdaptedLinears
from aioengine.model.experts.spec import DOWN, PLAIN, SHARED_DOWN
from aioengine.model.model import StepInputs

SUMMED = ("o", "down", DOWN, SHARED_DOWN)
"""Fused linears that are split over their inputs."""


class Scratch(NamedTuple):
    """Memory in which a step leaves what is to be exchanged."""

    x: Tensor
    """[T, hidden]"""
    h: Tensor
    """A's outputs [elements]."""
    rows_h: Tensor | None
    """The same for the rows of experts: [rows, elements of a row]."""


def between(name: str, adapted: AdaptedLinears) -> Exchange:
    """Return the exchange between A and B of the fused linear ``name``."""
    if not adapted.exchanges or name in PLAIN:
        return Exchange.NOTHING
    return Exchange.SUM if name in SUMMED else Exchange.GATHER


class StepExchange:
    """Exchanges of one step; ``pools`` by their ids in the library, of which ``head`` is for the sampled
    rows.

    To be given to the library as ``structs.ExchangeFunction``. An error ends the step, and is kept.
    """

    def __init__(
        self,
        adapted: AdaptedLinears,
        pools: Sequence[LoRAPool],
        head: LoRAPool | None,
        inputs: StepInputs,
        scratch: Scratch,
    ) -> None:
        self.error: BaseException | None = None
        self._adapted = adapted
        self._pools = pools
        self._head = head
        self._inputs = inputs
        self._scratch = scratch

    def __call__(self, what: int, pool: int) -> int:
        try:
            self._exchange(Exchange(what), self._pools[pool] if pool >= 0 else None)
        except BaseException as error:
            self.error = error
            return 1
        return 0

    def _exchange(self, what: Exchange, pool: LoRAPool | None) -> None:
        if what == Exchange.TOTAL:
            self._adapted.total(self._scratch.x, pool, self._inputs.lora)
            return
        assert pool is not None
        batch, memory = self._inputs.sample_lora if pool is self._head else self._inputs.lora, self._scratch.h
        if pool.slots.is_by_place:
            assert self._scratch.rows_h is not None
            memory = self._scratch.rows_h
            batch = _all_rows(batch, len(memory))
        shape = batch.num_tokens, len(pool.modules), batch.width
        h = memory.view(-1)[: math.prod(shape)].view(shape)
        if what == Exchange.SUM:
            self._adapted.sum(h, batch)
        else:
            h.copy_(self._adapted.gather(h, batch))


def _all_rows(batch: LoRABatch, rows: int) -> LoRABatch:
    """Return a batch of all rows of experts. Those without an adapter lie between the others, and are
    exchanged, too."""
    rank = max(segment.rank for segment in batch.segments)
    return LoRABatch.of([Segment(0, 0, rows, rank)], [], rows, batch.device)
