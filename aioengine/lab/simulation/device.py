"""The simulated device: it takes the time that a cost model says, and computes nothing."""

from __future__ import annotations

import asyncio

from aioengine.core.state import Request
from aioengine.errors import AdapterLoadError, AdapterTooLarge
from aioengine.executors.base import Device
from aioengine.lab.costs.model import CostModel
from aioengine.lab.costs.steps import StepTimes, step_shape
from aioengine.lab.simulation.clock import VirtualTimeLoop, resolution
from aioengine.lab.simulation.repeated import RepeatedSteps, TakeSteps
from aioengine.lab.simulation.transfers import Processor, SharedStage
from aioengine.lab.workload.requests import AdapterShape
from aioengine.model.spec import DTYPE_BYTES
from aioengine.step import (
    LoadedAdapter,
    ReadOrder,
    Sampled,
    SequenceWork,
    StepBatch,
    StepResult,
)


class SimulatedDevice(Device):
    """Gives every sequence ``token``, and ``end_token`` where its output has the length that is known of
    it (``lengths``, by request id; those that are not in it go on until ``max_tokens``).

    The adapters that it reads have a size and no contents (``shapes``, by name).
    """

    goes_ahead = True
    """Whether steps are taken at once where that is possible."""

    def __init__(
        self, costs: CostModel, *, token: int, end_token: int, max_rank: int, one_size: bool = True
    ) -> None:
        self.lengths: dict[str, int] = {}
        self.shapes: dict[str, AdapterShape] = {}
        self._costs = costs
        self._step_seconds = StepTimes(costs.steps)
        local = costs.local
        kv_bytes = local.kv_bytes_per_token(DTYPE_BYTES[local.dtype])
        self._byte_seconds = 2 * costs.steps.decode_kv / kv_bytes
        """Seconds for each byte that is moved on the device: it is read and written, as keys are read."""
        self.token = Sampled(token)
        """Token that every sequence gets before the end of its output."""
        self._end = Sampled(end_token)
        self._asked: tuple[StepBatch | None, float] = None, 0.0
        """The last step that was not run at once, and its seconds."""
        self._processor = Processor()
        self._disk = SharedStage(costs.disk)
        self._slot = SharedStage(costs.slot)
        self._max_rank = max_rank
        self._one_size = one_size
        """Whether every adapter takes a slot of one size, whatever its bytes are said to be."""
        self._nbytes: dict[int, int] = {}
        """Bytes of adapters whose size is that of their rank, by rank."""
        self._held: dict[int, int] = {}
        """Bytes on the CPU by adapter uid."""
        self.disturbed = self._processor.disturbed
        """Context manager, called with a factor: while it lasts, steps take that many times as long."""

    async def execute(self, batch: StepBatch) -> StepResult:
        asked, work = self._asked
        took = await self._processor.work(work if asked is batch else self._work(batch))
        return self._result(batch, took)

    def execute_at_once(self, batch: StepBatch) -> StepResult | None:
        """Run a step without a turn of the event loop; None if anything else is due before its end."""
        loop = asyncio.get_running_loop()
        if not isinstance(loop, VirtualTimeLoop) or (timer := loop.next_timer()) is None:
            return None
        begin, work = loop.time(), self._work(batch)
        end = begin + work * self._processor.pace
        if end + resolution(end) > timer:
            self._asked = batch, work
            return None
        loop.go_to(end)
        return self._result(batch, end - begin)

    def final(self, request: Request) -> int:
        """Return the number of tokens, prompt included, with which a request ends."""
        length, most = self.lengths.get(request.id), request.most_tokens
        if length is None or length <= request.output_tokens:
            return most
        return min(most, request.prompt_len + length)

    def last(self, request: Request) -> Sampled:
        """Return the token with which a request ends."""
        return self._end if self.lengths.get(request.id) == request.output_tokens + 1 else self.token

    def _work(self, batch: StepBatch) -> float:
        """Return the seconds of a step, its overhead included."""
        seconds = self._step_seconds(step_shape(batch)) if batch.sequences or batch.counted else 0.0
        return seconds + self._costs.step_overhead

    def _result(self, batch: StepBatch, took: float) -> StepResult:
        token, end, lengths = self.token, self._end, self.lengths
        sampled: list[Sampled | None] = []
        for request_id, _, tokens, start, _, sample, _, _, _, prompt_len, *_ in batch.sequences:
            if sample:
                made = start + len(tokens) - prompt_len + 1
                sampled.append(end if lengths.get(request_id) == made else token)
            else:
                sampled.append(None)
        return StepResult(sampled, took - self._costs.step_overhead)

    def repeat(self, batch: StepBatch, most: int, until: float, take: TakeSteps) -> RepeatedSteps | None:
        """Run ``batch`` and its repetitions, which take no turn of the event loop while nobody looks. None on
        a loop that is not in virtual time, or if a request ends with the first step.

        Args:
            most: Number of steps at most, with ``batch``; requests may end in the last one.
            until: Time before which each step begins.
        """
        loop = asyncio.get_running_loop()
        if not isinstance(loop, VirtualTimeLoop) or loop.time() >= until:
            return None
        lengths, overhead = self.lengths, self._costs.step_overhead
        made = [(work.request_id, _made(work)) for work in batch.sequences]
        for request_id, first in made:
            length = lengths.get(request_id)
            if length is not None and first <= length:
                most = min(most, length - first + 1)
        if most < 2:
            return None

        def last() -> list[Sampled | None]:
            more, token, end = most - 1, self.token, self._end
            return [end if first + more == lengths.get(request_id) else token for request_id, first in made]

        return RepeatedSteps(
            loop,
            self._processor,
            (seconds + overhead for seconds in self._step_seconds.repeated(step_shape(batch))),
            most=most,
            until=until,
            overhead=overhead,
            token=self.token,
            last=last,
            take=take,
        )

    async def load(self, order: ReadOrder) -> LoadedAdapter:
        """Simulate a read. Raises AdapterLoadError for an adapter without a shape, AdapterTooLarge for one
        that no slot can hold."""
        name, path = order.name, order.path
        shape = self.shapes.get(name)
        if shape is None:
            raise AdapterLoadError(
                "the workload has no adapter of this name", name=order.name, path=order.path
            )
        nbytes = self._bytes_of(shape.rank) if shape.nbytes is None else shape.nbytes
        with self.disturbed(self._costs.disk.slowdown):
            seconds = await self._disk.transfer(nbytes)
        if shape.rank > self._max_rank:
            raise AdapterTooLarge(
                f"rank {shape.rank} is above max_lora_rank={self._max_rank}; raise max_lora_rank",
                name=name,
                path=path,
            )
        self._held[order.uid] = nbytes
        in_slot = self._bytes_of(shape.rank) if self._one_size else nbytes
        return LoadedAdapter(shape.rank, nbytes, name, seconds, slot_nbytes=in_slot)

    def _bytes_of(self, rank: int) -> int:
        if rank not in self._nbytes:
            self._nbytes[rank] = self._costs.adapter_nbytes(rank)
        return self._nbytes[rank]

    async def place(self, uid: int, slot: int, offset: int) -> float:
        with self.disturbed(self._costs.slot.slowdown):
            return await self._slot.transfer(self._held[uid])

    def drop(self, uid: int) -> None:
        del self._held[uid]

    async def close(self) -> None:
        await asyncio.sleep(0)


def _made(work: SequenceWork) -> int:
    """Return the number of output tokens that a sequence has after a step."""
    return work.start + len(work.tokens) - work.prompt_len + 1
