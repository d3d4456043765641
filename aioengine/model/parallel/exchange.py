"""Exchanges between ranks, for which a compiled step calls back into Python."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from aioengine.kernels import LoRABatch, LoRAPool, Segment
from aioengine.kernels.cpu.structs import Exchange
from aioengine.model.adapted import AdaptedLinears
from aioengine.model.experts.spec import DOWN, PLAIN, SHARED_DOWN

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


def exchange(
    adapted: AdaptedLinears, what: Exchange, pool: LoRAPool | None, batch: LoRABatch, scratch: Scratch
) -> None:
    """Exchange what a step of the library has left for the linear of ``pool`` and the rows of ``batch``."""
    if what == Exchange.TOTAL:
        adapted.total(scratch.x, pool, batch)
        return
    assert pool is not None
    memory = scratch.h
    if pool.slots.is_by_place:
        assert scratch.rows_h is not None
        memory = scratch.rows_h
        batch = _all_rows(batch, len(memory))
    shape = batch.num_tokens, len(pool.modules), batch.width
    h = memory.view(-1)[: math.prod(shape)].view(shape)
    if what == Exchange.SUM:
        adapted.sum(h, batch)
    else:
        h.copy_(adapted.gather(h, batch))


def _all_rows(batch: LoRABatch, rows: int) -> LoRABatch:
    """Return a batch of all rows of experts. Those without an adapter lie between the others, and are
    exchanged, too."""
    rank = max(segment.rank for segment in batch.segments)
    return LoRABatch.of([Segment(0, 0, rows, rank)], [], rows, batch.device)
