"""Turns the events of a fleet's engines into the records of one run: a row for each request, whichever
replica served it."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Mapping

from aioengine.lab.runs.policy_record import PolicyWatch
from aioengine.lab.runs.recorder import Recorder, due
from aioengine.lab.runs.rows import Move, RequestRecord, Sample, Sink, SlotSpan, refused_request
from aioengine.lab.simulation.engine import SimulatedEngine
from aioengine.lab.workload.requests import Arrival, Objective


class FleetRecorder:
    """Recorder of a fleet, with the interface that :class:`~aioengine.lab.runs.recorder.Recorder` has for one
    engine. Slots are numbered throughout: those of the second replica follow those of the first."""

    def __init__(
        self,
        sink: Sink,
        *,
        start: float,
        ranks: Mapping[str, int],
        slots: int,
        delay: float,
        objective: Objective | None = None,
        listener: PolicyWatch | None = None,
    ) -> None:
        self.ended = 0
        self._sink = sink
        self._start = start
        self._ranks = ranks
        self._objective = objective
        self._listener = listener
        self._slots = slots
        self._delay = delay
        """Seconds that a message of a replica takes to the door."""
        self._recorders: dict[int, Recorder] = {}
        self._progress = start
        self._arrivals: dict[str, Arrival] = {}
        self._attempts: dict[str, list[RequestRecord]] = {}
        self._samples: list[Sample] = []

    def watch(self, engine: SimulatedEngine, index: int) -> Callable[[], None]:
        """Record this engine's events as those of replica ``index``; returns a function that ends it."""
        sink = _ReplicaSink(self, self._slots * index)
        recorder = Recorder(engine, sink, start=self._start, ranks=self._ranks, objective=self._objective)
        self._recorders[index] = recorder
        remove = engine.add_listener(recorder, *recorder.heard)
        if self._listener is not None:
            engine.add_listener(self._listener, *self._listener.HEARD)

        def unwatch() -> None:
            remove()
            recorder.close(asyncio.get_running_loop().time())
            if self._recorders.get(index) is recorder:
                del self._recorders[index]

        return unwatch

    @property
    def under_way(self) -> bool:
        return bool(self._arrivals)

    @property
    def last_progress(self) -> float:
        return max((r.last_progress for r in self._recorders.values()), default=self._progress)

    @last_progress.setter
    def last_progress(self, now: float) -> None:
        self._progress = now
        for recorder in self._recorders.values():
            recorder.last_progress = now

    @property
    def since_token(self) -> int:
        """Steps and moves since the last token, on the replica with the most of them."""
        return max((r.since_token for r in self._recorders.values()), default=0)

    def expect(self, request_id: str, arrival: Arrival) -> None:
        self._arrivals[request_id] = arrival
        self._attempts[request_id] = []

    def settled(
        self, request_id: str, now: float, error: Exception | None, tokens: int | None = None
    ) -> bool:
        """Write the row of a request that has ended for its caller. Returns False if no replica had accepted
        it.

        ``tokens`` is the number that its caller has; a replica that was cut off may have generated more.
        """
        arrival = self._arrivals.pop(request_id)
        attempts = self._attempts.pop(request_id)
        self.ended += 1
        if not attempts:
            self._sink.request(self._refused(request_id, arrival, now, error))
            return False
        first, last = attempts[0], attempts[-1]
        gaps = [record.worst_gap for record in attempts if record.worst_gap is not None]
        first_token = next((r.first_token for r in attempts if r.first_token is not None), None)
        self._sink.request(
            last._replace(
                prompt_tokens=first.prompt_tokens,
                output_tokens=sum(record.output_tokens for record in attempts) if tokens is None else tokens,
                arrival=arrival.time,
                admitted=next((r.admitted for r in attempts if r.admitted is not None), None),
                first_token=None if first_token is None else first_token + self._delay,
                ended=now - self._start,
                found=first.found,
                cached_tokens=first.cached_tokens,
                preemptions=sum(record.preemptions for record in attempts),
                worst_gap=max(gaps, default=None),
                reason="error" if error is not None else last.reason,
                error=None if error is None else type(error).__name__,
                deadline=due(arrival, self._objective),
            )
        )
        return True

    def sample(self, now: float) -> None:
        for recorder in self._recorders.values():
            recorder.sample(now)
        self._write_samples(now)

    def close(self, now: float) -> None:
        """End the recording, when all engines have stopped."""
        self._progress = now
        self._write_samples(now)

    def attempt(self, record: RequestRecord) -> None:
        """Note that a request has ended on a replica, unless the door has settled it already."""
        attempts = self._attempts.get(record.request_id)
        if attempts is not None:
            attempts.append(record)

    def _refused(
        self, request_id: str, arrival: Arrival, now: float, error: Exception | None
    ) -> RequestRecord:
        return refused_request(
            request_id,
            arrival,
            ended=now - self._start,
            deadline=due(arrival, self._objective),
            rank=0 if arrival.adapter is None else self._ranks.get(arrival.adapter, 0),
            error=error,
        )

    def _write_samples(self, now: float) -> None:
        """Combine the rows of the replicas."""
        rows, self._samples = self._samples, []
        service: Counter[str] = Counter()
        for row in rows:
            service.update(json.loads(row.service))
        count = max(len(rows), 1)
        self._sink.sample(
            Sample(
                time=now - self._start,
                running=sum(row.running for row in rows),
                waiting=sum(row.waiting for row in rows),
                steps=sum(row.steps for row in rows),
                step_seconds=sum(row.step_seconds for row in rows),
                prefill_tokens=sum(row.prefill_tokens for row in rows),
                decode_tokens=sum(row.decode_tokens for row in rows),
                adapters=sum(row.adapters for row in rows),
                kv_used=sum(row.kv_used for row in rows) / count,
                slots_ready=sum(row.slots_ready for row in rows),
                cpu_adapters=sum(row.cpu_adapters for row in rows),
                service=json.dumps(service, sort_keys=True, separators=(",", ":")),
            )
        )

    def keep(self, sample: Sample) -> None:
        """Add a replica's sample to those of the others."""
        self._samples.append(sample)

    def span(self, record: SlotSpan) -> None:
        self._sink.span(record)

    def move(self, record: Move) -> None:
        self._sink.move(record)


class _ReplicaSink:
    """Receiver of the rows of one replica's recorder."""

    def __init__(self, fleet: FleetRecorder, first_slot: int) -> None:
        self._fleet = fleet
        self._first_slot = first_slot

    def request(self, record: RequestRecord) -> None:
        self._fleet.attempt(record)

    def span(self, record: SlotSpan) -> None:
        self._fleet.span(record._replace(slot=record.slot + self._first_slot))

    def move(self, record: Move) -> None:
        self._fleet.move(record)

    def sample(self, record: Sample) -> None:
        self._fleet.keep(record)
