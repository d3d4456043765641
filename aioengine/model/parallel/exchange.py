"""What a compiled step comes back to Python for, where several ranks hold the model: their exchanges."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from aioengine.kernels.cpu.structs import Exchange
from aioengine.model.adapted import AdaptedLinears
from aioengine.model.decoder import StepInputs
from aioengine.model.slots.pool import FusedLoRA


def between(name: str, adapted: AdaptedLinears) -> Exchange:
    """What the ranks exchange between A and B of the fused linear ``name``."""
    if not adapted.exchanges:
        return Exchange.NOTHING
    return Exchange.SUM if name in ("o", "down") else Exchange.GATHER


class StepExchange:
    """Of one step, whose scratch memory is ``x`` [T, hidden] and ``h`` [elements]; ``pools`` by their ids in
    the library, of which ``head`` is for the sampled rows.

    To be given to the library as ``structs.ExchangeFunction``. An error ends the step, and is kept.
    """

    def __init__(
        self,
        adapted: AdaptedLinears,
        pools: Sequence[FusedLoRA],
        head: FusedLoRA | None,
        inputs: StepInputs,
        x: Tensor,
        h: Tensor,
    ) -> None:
        self.error: BaseException | None = None
        self._adapted = adapted
        self._pools = pools
        self._head = head
        self._inputs = inputs
        self._x = x
        self._h = h

    def __call__(self, what: int, pool: int) -> int:
        try:
            self._exchange(Exchange(what), self._pools[pool] if pool >= 0 else None)
        except BaseException as error:
            self.error = error
            return 1
        return 0

    def _exchange(self, what: Exchange, pool: FusedLoRA | None) -> None:
        if what == Exchange.TOTAL:
            self._adapted.total(self._x, None, pool, self._inputs.lora)
            return
        assert pool is not None
        batch = self._inputs.sample_lora if pool is self._head else self._inputs.lora
        slices, rank = len(pool.modules), pool.b[0].shape[2]
        whole = self._rows(batch.num_tokens, slices, rank)
        if what == Exchange.SUM:
            self._adapted.sum(whole, batch)
        else:
            held = self._rows(batch.num_tokens, slices, pool.a.shape[1] // slices)
            whole.copy_(self._adapted.gather(held, pool, batch))

    def _rows(self, rows: int, slices: int, rank: int) -> Tensor:
        return self._h[: rows * slices * rank].view(rows, slices, rank)
