"""SimulatedEngine: the engine that serves, over a device that only takes time."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Unpack

import msgspec

from aioengine.config import EngineConfig
from aioengine.engine import AsyncEngine
from aioengine.info import EngineStats, LoadProgress
from aioengine.lab.costs.model import CostModel, ModelledCosts
from aioengine.lab.simulation.device import SimulatedDevice
from aioengine.lab.workload.requests import AdapterShape
from aioengine.memory_plan import MemoryPlan
from aioengine.request import Prompt, RequestKeywords, SamplingParams
from aioengine.runtime.assemble import Built
from aioengine.runtime.output import RequestOutput
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
            metrics=self._with_metrics,
            costs=ModelledCosts(self.costs, self._device.shapes, self.config.max_num_batched_tokens),
            virtual=True,
        )

    def add_adapters(self, shapes: Iterable[AdapterShape]) -> None:
        """Register adapters that have a size and no contents."""
        for shape in shapes:
            self._device.shapes[shape.name] = shape
            self.register_adapter(shape.name, f"/simulated/{shape.name}")

    @property
    def lengths(self) -> dict[str, int]:
        """By request that has not ended: with which token its output ends, if it is allowed as many."""
        return self._device.lengths

    def use_lengths(self, lengths: dict[str, int]) -> None:
        """Share these lengths with other engines."""
        self._device.lengths = lengths

    def settle(self) -> None:
        """Take in the steps that have ended, before somebody looks at the core."""
        self._device.settle()

    async def complete(self, *args: Any, **keywords: Any) -> RequestOutput:
        self.settle()  # what was decided before does not know of this request
        return await super().complete(*args, **keywords)

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        **keywords: Unpack[RequestKeywords],
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield the first output and the last one."""
        self.settle()
        stream = await self._submit(prompt, params, keywords)
        try:
            first = await stream.next()
            yield first
            if not first.finished:
                yield await stream.last()
        finally:
            self._loop.abort(stream.request)

    def stats(self) -> EngineStats:
        self.settle()
        return super().stats()

    async def stop(self) -> None:
        self.settle()
        await super().stop()
