"""The simulated device: it takes the time that a cost model says, and computes nothing."""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice

from aioengine.errors import AdapterLoadError, AdapterTooLarge
from aioengine.executors.base import Device, Ended
from aioengine.lab.costs.model import CostModel
from aioengine.lab.costs.steps import StepTimes, step_shape
from aioengine.lab.simulation.clock import VirtualTimeLoop, resolution
from aioengine.lab.simulation.transfers import SharedStage
from aioengine.lab.workload.requests import AdapterShape
from aioengine.step import LoadedAdapter, ReadOrder, StepBatch, StepResult

MOST_STEPS = 32
"""Steps that are under way at a time, at most: more would often be reckoned in vain, because something
happens."""
ENDLESS = -(1 << 40)
"""Length of an output that goes on until ``max_tokens``: no step reaches it."""


@dataclass(slots=True, eq=False)
class _Flight:
    """Steps under way, one after the other: what is known of them in advance."""

    loop: asyncio.AbstractEventLoop
    batch: StepBatch
    ended: Ended
    begin: float
    ends: list[float]
    most: int
    """Number of the step in which sequences may end, those with the indices ``ending``."""
    ending: list[int]
    timer: asyncio.TimerHandle = field(init=False)
    """For the end of the last one."""


class SimulatedDevice(Device):
    """Gives every sequence ``token``, and ``end_token`` where its output has the length that is known of
    it (``lengths``, by request id; those that are not in it go on until ``max_tokens``).

    On a loop in virtual time, steps of a batch that follow each other are handed over together, each with the
    time of its end, unless something happens to their engine meanwhile.

    The adapters that it reads have a size and no contents (``shapes``, by name).
    """

    repeats = True
    """Whether steps that follow each other are handed over together."""

    def __init__(
        self, costs: CostModel, *, token: int, end_token: int, max_rank: int, one_size: bool = True
    ) -> None:
        self.lengths: dict[str, int] = {}
        self.shapes: dict[str, AdapterShape] = {}
        self._costs = costs
        self._step_seconds = StepTimes(costs.steps)
        self._token, self._end = token, end_token
        self._paces: list[float] = [1.0]
        """Factors of all that disturbs steps on their time; the largest counts."""
        self._pace = 1.0
        self._flight: _Flight | None = None
        """The steps under way."""
        self._disk = SharedStage(costs.disk)
        self._slot = SharedStage(costs.slot)
        self._max_rank = max_rank
        self._one_size = one_size
        """Whether every adapter takes a slot of one size, whatever its bytes are said to be."""
        self._nbytes: dict[int, int] = {}
        """Bytes of adapters whose size is that of their rank, by rank."""
        self._held: dict[int, int] = {}
        """Bytes on the CPU by adapter uid."""

    def begin(self, batch: StepBatch, ended: Ended) -> None:
        """Begin the batch's steps. They are handed over when the last one has ended or, before, when somebody
        looks (:meth:`settle`) or something has happened (:meth:`interrupt`)."""
        loop = asyncio.get_running_loop()
        together = self.repeats and isinstance(loop, VirtualTimeLoop)
        most, ending = self._until_an_end(batch, min(batch.steps, MOST_STEPS) if together else 1)
        begin, pace, ends = loop.time(), self._pace, list[float]()
        for work in islice(self._work(batch), most):
            if ends and begin >= batch.until:
                break
            begin += work * pace
            ends.append(begin)
        self._flight = flight = _Flight(loop, batch, ended, loop.time(), ends, most, ending)
        flight.timer = loop.call_at(begin, self._all_ended, flight)

    def _all_ended(self, flight: _Flight) -> None:
        now = flight.loop.time()
        flight.ends[-1] = max(flight.ends[-1], now)  # timers that are due at almost one time go off together
        self._hand_over(flight, len(flight.ends))

    def _hand_over(self, flight: _Flight, count: int) -> None:
        """Hand over the first steps of those that are under way, at the time at which the last of them
        ended."""
        flight.timer.cancel()
        self._flight = None
        loop, ends = flight.loop, flight.ends[:count]
        result = self._result(flight, ends)
        if isinstance(loop, VirtualTimeLoop):
            with loop.at(ends[-1]):
                flight.ended(result)
        else:
            flight.ended(result._replace(ends=()))

    def settle(self) -> None:
        """Hand over the steps that have ended; those after them go on."""
        flight = self._flight
        if flight is not None and len(flight.ends) > 1:
            now = flight.loop.time()
            count = bisect_right(flight.ends, now - resolution(now))
            if 0 < count < len(flight.ends):
                self._hand_over(flight, count)

    def interrupt(self) -> None:
        """End with the step that is under way, because its engine has something new to decide on. Whoever
        changes something settles before: steps that ended then were decided without it."""
        flight = self._flight
        if flight is not None and len(flight.ends) > 1:
            now = flight.loop.time()
            del flight.ends[bisect_right(flight.ends, now - resolution(now)) + 1 :]
            self._time(flight)

    def _time(self, flight: _Flight) -> None:
        flight.timer.cancel()
        flight.timer = flight.loop.call_at(flight.ends[-1], self._all_ended, flight)

    @contextmanager
    def disturbed(self, slowdown: float) -> Iterator[None]:
        """Make steps take at least ``slowdown`` times as long while the context lasts."""
        self._change([*self._paces, slowdown])
        try:
            yield
        finally:
            paces = [*self._paces]
            paces.remove(slowdown)
            self._change(paces)

    def _change(self, paces: list[float]) -> None:
        """Set the factors on the time of steps, and adjust the step under way to them."""
        self.settle()
        before, self._paces = self._pace, paces
        self._pace = after = max(paces)
        flight = self._flight
        if flight is not None and before != after:
            del flight.ends[1:]
            now = flight.loop.time()
            flight.ends[0] = now + max(flight.ends[0] - now, 0.0) / before * after
            self._time(flight)

    def _work(self, batch: StepBatch) -> Iterator[float]:
        """Yield the seconds of each step, its overhead included."""
        overhead = self._costs.step_overhead
        for seconds in self._step_seconds.repeated(step_shape(batch)):
            yield seconds + overhead

    def _until_an_end(self, batch: StepBatch, most: int) -> tuple[int, list[int]]:
        """Return how many steps there are until a sequence ends, at most ``most``, and the indices of the
        sequences that end then."""
        length = self.lengths.get
        left = [length(r.request_id, ENDLESS) + r.prompt_len - len(r.history) for r in batch.sequences]
        if most > 1:
            most = min([tokens for tokens in left if 0 < tokens < most], default=most)
        return most, [index for index, tokens in enumerate(left) if tokens == most] if most in left else []

    def _result(self, flight: _Flight, ends: Sequence[float]) -> StepResult:
        begins, overhead = (flight.begin, *ends[:-1]), self._costs.step_overhead
        seconds = [end - begin - overhead for begin, end in zip(begins, ends, strict=True)]
        steps = len(ends)
        counts = [steps if work.sample else 0 for work in flight.batch.sequences]
        tokens = [self._token] * sum(counts)
        for index in flight.ending if steps == flight.most else ():
            if counts[index]:
                tokens[sum(counts[: index + 1]) - 1] = self._end
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
        return LoadedAdapter(shape.rank, nbytes, in_slot, name, seconds)

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
