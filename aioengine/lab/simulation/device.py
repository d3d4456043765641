"""The simulated device: it takes the time that a cost model says, and computes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from itertools import islice

from aioengine.errors import AdapterLoadError, AdapterTooLarge
from aioengine.executors.base import Device, Ended
from aioengine.lab.costs.model import CostModel
from aioengine.lab.costs.steps import StepTimes, step_shape
from aioengine.lab.simulation.clock import VirtualTimeLoop, resolution
from aioengine.lab.simulation.transfers import Processor, SharedStage
from aioengine.lab.workload.requests import AdapterShape
from aioengine.model.spec import DTYPE_BYTES
from aioengine.step import (
    LoadedAdapter,
    ReadOrder,
    SequenceWork,
    StepBatch,
    StepResult,
)

SETTLING = 4
"""Turns of the loop in which callers that have their results go on, and moves of adapters begin, before steps
are taken at once."""


class SimulatedDevice(Device):
    """Gives every sequence ``token``, and ``end_token`` where its output has the length that is known of
    it (``lengths``, by request id; those that are not in it go on until ``max_tokens``).

    On a loop in virtual time, steps that end before anything else is due are taken at once: nobody can look
    in between, so they need no turns of the loop.

    The adapters that it reads have a size and no contents (``shapes``, by name).
    """

    repeats = True
    """Whether steps are taken at once where nothing happens before their ends."""

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
        self._token, self._end = token, end_token
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

    def begin(self, batch: StepBatch, ended: Ended) -> None:
        loop = asyncio.get_running_loop()
        if self.repeats and isinstance(loop, VirtualTimeLoop):
            loop.call_soon(self._take_steps, loop, batch, ended, SETTLING)
        else:
            self._take_step(batch, ended)

    def _take_steps(self, loop: VirtualTimeLoop, batch: StepBatch, ended: Ended, turns: int) -> None:
        """Take the steps that end before anything else is due, at once; or else one that takes its time."""
        timer = loop.next_timer()
        if timer is None and turns > 0:
            loop.call_soon(self._take_steps, loop, batch, ended, turns - 1)
            return
        ends, seconds = list[float](), list[float]()
        if timer is not None:
            begin, overhead = loop.time(), self._costs.step_overhead
            for work in islice(self._work(batch), self._most_steps(batch)):
                end = begin + work * self._processor.pace
                if end + resolution(end) > timer or (ends and begin >= batch.until):
                    break
                ends.append(end)
                seconds.append(end - begin - overhead)
                begin = end
        if ends:
            loop.go_to(ends[-1])
            ended(self._result(batch, seconds, ends))
        else:
            self._take_step(batch, ended)

    def _take_step(self, batch: StepBatch, ended: Ended) -> None:
        overhead = self._costs.step_overhead
        self._processor.begin(
            next(self._work(batch)), lambda took: ended(self._result(batch, [took - overhead], ()))
        )

    def _work(self, batch: StepBatch) -> Iterator[float]:
        """Yield the seconds of each step, its overhead included."""
        overhead = self._costs.step_overhead
        for seconds in self._step_seconds.repeated(step_shape(batch)):
            yield seconds + overhead

    def _most_steps(self, batch: StepBatch) -> int:
        """Return how many steps there are until a sequence ends, or those of the batch, if they are fewer."""
        most, lengths = batch.steps, self.lengths
        for work in batch.sequences if most > 1 else ():
            length, made = lengths.get(work.request_id), _made(work)
            if length is not None and made <= length < made + most:
                most = length - made + 1
        return most

    def _result(self, batch: StepBatch, seconds: Sequence[float], ends: Sequence[float]) -> StepResult:
        lengths, steps, sequences = self.lengths, len(seconds), batch.sequences
        counts = [steps if work.sample else 0 for work in sequences]
        tokens = [self._token] * sum(counts)
        place = -1
        for work, count in zip(sequences, counts, strict=True):
            place += count
            if count and lengths.get(work.request_id) == _made(work) + count - 1:
                tokens[place] = self._end
        return StepResult(tokens, counts, seconds, ends)

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
