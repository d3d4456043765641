"""View of a cost model for policies: the ``view.costs`` of a simulated engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from aioengine.lab.costs.model import CostModel
from aioengine.lab.costs.steps import StepShape, StepTimes
from aioengine.lab.workload.requests import AdapterShape


class ModelledCosts:
    """The :class:`~aioengine.schedulers.policy.CostsView` of a cost model.

    Args:
        shapes: The adapters, by name.
        chunk: Tokens that one step computes at most.
    """

    def __init__(self, costs: CostModel, shapes: Mapping[str, AdapterShape], chunk: int) -> None:
        self._costs = costs
        self._shapes = shapes
        self._chunk = chunk
        self._times = StepTimes(costs.steps)

    def step(self, tokens: int, ranks: Sequence[int] = (), *, context: int = 0) -> float | None:
        each, more = divmod(tokens, len(ranks)) if ranks else (0, 0)
        adapters = tuple((rank, each + (place < more)) for place, rank in enumerate(ranks))
        shape = StepShape(tokens, tokens * context, 0, 0, tokens, adapters)
        return self._times(shape) + self._costs.step_overhead

    def prefill(self, tokens: int, rank: int = 0, *, cached: int = 0) -> float | None:
        seconds = 0.0
        for start in range(0, tokens, self._chunk):
            count = min(self._chunk, tokens - start)
            pairs = count * (2 * (cached + start) + count) // 2
            adapters = ((rank, count),) if rank else ()
            shape = StepShape(0, 0, count, pairs, 1, adapters)
            seconds += self._times(shape) + self._costs.step_overhead
        return seconds

    def load(self, adapter: str, stage: Literal["disk", "slot"]) -> float | None:
        shape = self._shapes.get(adapter.partition("@")[0])
        if shape is None:
            return None
        nbytes = self._costs.adapter_nbytes(shape.rank) if shape.nbytes is None else shape.nbytes
        return (self._costs.disk if stage == "disk" else self._costs.slot).seconds(nbytes)
