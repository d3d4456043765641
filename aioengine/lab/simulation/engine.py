"""SimulatedEngine: the engine that serves, over a device that only takes time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import msgspec

from aioengine.config import EngineConfig
from aioengine.engine import AsyncEngine
from aioengine.info import LoadProgress
from aioengine.lab.costs.model import CostModel
from aioengine.lab.costs.view import ModelledCosts
from aioengine.lab.simulation.device import SimulatedDevice
from aioengine.lab.workload.requests import AdapterShape
from aioengine.memory_plan import MemoryPlan
from aioengine.runtime.assemble import Built
from aioengine.schedulers import SchedulerPolicy

TOKEN = 0
"""Token that prompts consist of, and that is generated until the last one."""


class SimulatedEngine(AsyncEngine):
    """An :class:`~aioengine.engine.AsyncEngine` whose steps, reads and copies take what ``costs`` says.

    For a loop in virtual time (``run_in_virtual_time``); on any other it takes the time
    that it simulates. It has no tokenizer: prompts are token ids, of which 0 always is one.
    Decisions are timed on the loop's clock as well, on which they take none: so no policy overruns its
    budget, and every run does the same. ``plan`` is the memory plan of an engine of this configuration, if it
    is known already; a large fleet makes it once.
    """

    def __init__(
        self,
        config: EngineConfig,
        costs: CostModel,
        policy: SchedulerPolicy | None = None,
        *,
        metrics: bool = True,
        plan: MemoryPlan | None = None,
    ) -> None:
        super().__init__(config, policy)
        self._with_metrics = metrics
        self._known_plan = plan
        self.costs = costs
        spec = costs.spec
        self._end_token = spec.vocab_size - 1
        self._spec = msgspec.structs.replace(spec, eos_token_ids=(self._end_token,))
        max_rank, one_size = 0, True
        if config.lora is not None:
            max_rank, one_size = config.lora.max_lora_rank, config.lora.slot_memory is None
        self._device = SimulatedDevice(
            costs, token=TOKEN, end_token=self._end_token, max_rank=max_rank, one_size=one_size
        )

    async def _build(self, work: ThreadPoolExecutor, progress: LoadProgress | None) -> Built:
        return Built(
            spec=self._spec,
            plan=self._known_plan or self.costs.plan(self.config),
            tokenizer=None,
            device=self._device,
            resolver=None,
            timer=asyncio.get_running_loop().time,
            processor=asyncio.get_running_loop().time,
            metrics=self._with_metrics,
            costs=ModelledCosts(self.costs, self._device.shapes, self.config.max_num_batched_tokens),
            virtual=True,
        )

    def add_adapters(self, shapes: Iterable[AdapterShape]) -> None:
        """Register adapters that have a size and no contents."""
        for shape in shapes:
            self._device.shapes[shape.name] = shape
            self.register_adapter(shape.name, f"/simulated/{shape.name}")

    def set_length(self, request_id: str, tokens: int) -> None:
        """Have the request's output end with its ``tokens``-th token, if it is allowed as many."""
        self._device.lengths[request_id] = tokens

    def forget_length(self, request_id: str) -> None:
        """Note that the request has ended."""
        self._device.lengths.pop(request_id, None)
