"""Exchanges between ranks, for which a compiled step calls back into Python."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from aioengine.kernels import LoRAPool
from aioengine.kernels.cpu.structs import Exchange
from aioengine.model.adapted import AdaptedLinears
from aioengine.model.decoder import StepInputs


def between(name: str, adapted: AdaptedLinears) -> Exchange:
    """Return the exchange between A and B of the fused linear ``name``."""
    if not adapted.exchanges:
        return Exchange.NOTHING
    return Exchange.SUM if name in ("o", "down") else Exchange.GATHER


class StepExchange:
    """Exchanges of one step, whose scratch memory is ``x`` [T, hidden], ``h`` [elements] and ``squares``
    [T, 2]; ``pools`` by their ids in the library, of which ``head`` is for the sampled rows.

    To be given to the library as ``structs.ExchangeFunction``. An error ends the step, and is kept.
    """

    def __init__(
        self,
        adapted: AdaptedLinears,
        pools: Sequence[LoRAPool],
        head: LoRAPool | None,
        inputs: StepInputs,
        x: Tensor,
        h: Tensor,
        squares: Tensor,
    ) -> None:
        self.error: BaseException | None = None
        self._adapted = adapted
        self._pools = pools
        self._head = head
        self._inputs = inputs
        self._x = x
        self._h = h
        self._squares = squares

    def __call__(self, what: int, pool: int) -> int:
        try:
            self._exchange(Exchange(what), self._pools[pool] if pool >= 0 else None)
        except BaseException as error:
            self.error = error
            return 1
        return 0

    def _exchange(self, what: Exchange, pool: LoRAPool | None) -> None:
        if what == Exchange.TOTAL:
            self._adapted.total(self._x, None, pool, self._inputs.lora)
            return
        if what == Exchange.SQUARES:
            self._adapted.group.all_reduce(self._squares)
            return
        assert pool is not None
        batch = self._inputs.sample_lora if pool is self._head else self._inputs.lora
        rows = batch.num_tokens * len(pool.modules)
        h = self._h[: rows * batch.width].view(batch.num_tokens, len(pool.modules), batch.width)
        if what == Exchange.SUM:
            self._adapted.sum(h, batch)
        else:
            h.copy_(self._adapted.gather(h, batch))
