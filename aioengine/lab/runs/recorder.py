"""Turns an engine's events into records: requests, slots, moves, and samples at regular times."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from aioengine import events
from aioengine.engine import AsyncEngine
from aioengine.lab.runs.rows import Move, RequestRecord, Sample, Sink, SlotSpan, refused_request
from aioengine.lab.workload.requests import Arrival, Objective
from aioengine.schedulers.policy import SlotState

BASE = "(base)"
"""The base model in ``Sample.service``; no adapter can have this name."""


@dataclass(slots=True)
class _Request:
    added: events.RequestAdded
    arrival: Arrival | None
    admitted: float | None = None
    first_token: float | None = None
    cached_tokens: int = 0
    preemptions: int = 0
    served: int = 0
    """Tokens computed for it that samples have counted."""


@dataclass(slots=True)
class _Span:
    adapter: str
    start: float
    ready: float | None = None
    busy_steps: int = 0


_Version = tuple[str, int]
"""An adapter's name and version."""


class Recorder:
    """A listener of an engine's events. It holds only what has not ended yet.

    Args:
        start: Time of the engine's clock at the start of the run.
        ranks: Rank of each adapter.
        objective: That of the workload.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        sink: Sink,
        *,
        start: float,
        ranks: Mapping[str, int],
        objective: Objective | None = None,
    ) -> None:
        self.ended = 0
        """Requests that have ended, the refused ones included."""
        self.last_progress = start
        """When a step or a move ended last."""
        self.since_token = 0
        """Steps and moves that have ended since a request had a token, or ended."""
        self._core = engine._core  # how far each request has come is in no event
        self._engine = engine
        self._sink = sink
        self._start = start
        self._ranks = ranks
        self._objective = objective
        self._expected: dict[str, Arrival] = {}
        self._requests: dict[str, _Request] = {}
        self._reads: dict[_Version, float] = {}
        self._copies: dict[_Version, tuple[int, float]] = {}
        self._spans: dict[int, _Span] = {}
        self._totals = _Totals()
        self._service: Counter[str] = Counter()
        for slot in engine.stats().slots:
            if slot.adapter is not None:
                self._spans[slot.index] = _Span(slot.adapter, start, start)
        self._on: dict[type[events.Event], Callable[[Any], None]] = {
            events.RequestAdded: self._added,
            events.RequestAdmitted: self._admitted,
            events.RequestPreempted: self._preempted,
            events.FirstToken: self._first_token,
            events.RequestEnded: self._ended,
            events.AdapterLoading: self._loading,
            events.AdapterLoaded: self._loaded,
            events.AdapterPlacing: self._placing,
            events.AdapterPlaced: self._placed,
            events.AdapterEvicted: self._evicted,
            events.AdapterFailed: self._failed,
            events.StepsFinished: self._steps,
        }

    @property
    def heard(self) -> Collection[type[events.Event]]:
        """Return the types of events that it listens to."""
        return self._on.keys()

    @property
    def under_way(self) -> bool:
        """Whether there is a request that has not ended."""
        return bool(self._requests)

    def __call__(self, event: events.Event) -> None:
        self._on[type(event)](event)

    # Requests

    def expect(self, request_id: str, arrival: Arrival) -> None:
        """Announce a request before it is sent."""
        self._expected[request_id] = arrival

    def refused(self, request_id: str, now: float, error: Exception) -> bool:
        """Record that a request failed with ``error``. Returns False if the engine had accepted it: then its
        end is recorded."""
        arrival = self._expected.pop(request_id, None)
        if arrival is None:
            return False
        self.ended += 1
        self._sink.request(
            refused_request(
                request_id,
                arrival,
                ended=now - self._start,
                deadline=due(arrival, self._objective),
                rank=self._rank(arrival.adapter),
                error=error,
            )
        )
        return True

    def _added(self, event: events.RequestAdded) -> None:
        arrival = self._expected.pop(event.request_id, None)
        self._requests[event.request_id] = _Request(event, arrival)

    def _admitted(self, event: events.RequestAdmitted) -> None:
        request = self._requests.get(event.request_id)
        if request is not None and not event.resumed:
            request.admitted = event.time - self._start
            request.cached_tokens = event.cached_tokens

    def _preempted(self, event: events.RequestPreempted) -> None:
        request = self._requests.get(event.request_id)
        if request is not None:
            request.preemptions += 1

    def _first_token(self, event: events.FirstToken) -> None:
        request = self._requests.get(event.request_id)
        self.since_token = 0
        if request is not None:
            request.first_token = event.time - self._start

    def _ended(self, event: events.RequestEnded) -> None:
        request = self._requests.pop(event.request_id, None)
        if request is None:  # it came before the recorder
            return
        self.ended += 1
        self.since_token = 0
        if request.first_token is not None:
            self._serve(request, event.prompt_tokens - request.cached_tokens + event.output_tokens)
        arrival = request.arrival
        self._sink.request(
            RequestRecord(
                request_id=event.request_id,
                adapter=event.adapter,
                tenant=event.tenant,
                prompt_tokens=event.prompt_tokens,
                output_tokens=event.output_tokens,
                arrival=request.added.time - self._start,
                admitted=request.admitted,
                first_token=request.first_token,
                ended=event.time - self._start,
                reason=event.reason,
                found=request.added.location,
                cached_tokens=request.cached_tokens,
                preemptions=request.preemptions,
                worst_gap=event.worst_gap,
                deadline=None if arrival is None else due(arrival, self._objective),
                rank=self._rank(event.adapter),
                error=None if event.error is None else type(event.error).__name__,
            )
        )

    def _serve(self, request: _Request, tokens: int) -> None:
        """Add the tokens that have been computed for a request since it was accepted."""
        if tokens > request.served:  # less after a preemption: it is not counted twice
            added = request.added
            client = added.tenant if added.tenant is not None else added.adapter or BASE
            self._service[client] += tokens - request.served
            request.served = tokens

    def _rank(self, adapter: str | None) -> int:
        return 0 if adapter is None else self._ranks.get(adapter, 0)

    # Adapters

    def _loading(self, event: events.AdapterLoading) -> None:
        self._reads[event.adapter, event.version] = event.time

    def _loaded(self, event: events.AdapterLoaded) -> None:
        self._move("disk", event, self._reads.pop((event.adapter, event.version), event.time), event.nbytes)

    def _placing(self, event: events.AdapterPlacing) -> None:
        self._copies[event.adapter, event.version] = event.slot, event.time
        self._close_span(event.slot, event.time)  # a copy that was lost with the device leaves one
        self._spans[event.slot] = _Span(event.adapter, event.time)

    def _placed(self, event: events.AdapterPlaced) -> None:
        _, start = self._copies.pop((event.adapter, event.version), (event.slot, event.time))
        self._move("slot", event, start, event.nbytes)
        if event.slot in self._spans:
            self._spans[event.slot].ready = event.time

    def _evicted(self, event: events.AdapterEvicted) -> None:
        if event.slot is not None:
            self._close_span(event.slot, event.time)

    def _failed(self, event: events.AdapterFailed) -> None:
        key, error = (event.adapter, event.version), type(event.error).__name__
        copy = self._copies.pop(key, None)
        if copy is not None:
            slot, start = copy
            self._move("slot", event, start, 0, error)
            self._close_span(slot, event.time)
        elif key in self._reads:
            self._move("disk", event, self._reads.pop(key), 0, error)

    def _move(
        self, stage: str, event: events.AdapterEvent, start: float, nbytes: int, error: str | None = None
    ) -> None:
        self.last_progress = event.time
        self.since_token += 1
        end = event.time - self._start
        self._sink.move(Move(stage, event.adapter, start - self._start, end, nbytes, error))

    def _close_span(self, slot: int, now: float) -> None:
        span = self._spans.pop(slot, None)
        if span is not None:
            ready = None if span.ready is None else span.ready - self._start
            self._sink.span(
                SlotSpan(
                    slot, span.adapter, span.start - self._start, ready, now - self._start, span.busy_steps
                )
            )

    # Steps

    def _steps(self, event: events.StepsFinished) -> None:
        count = len(event.seconds)
        self.last_progress = event.time
        self.since_token = 0 if event.decode_tokens else self.since_token + count
        totals, spans = self._totals, self._spans
        totals.steps += count
        for seconds in event.seconds:
            totals.seconds += seconds
        totals.prefill_tokens += count * event.prefill_tokens
        totals.decode_tokens += count * event.decode_tokens
        totals.adapters += count * event.adapters
        for slot in event.slots:
            spans[slot].busy_steps += count

    def sample(self, now: float) -> None:
        """Record the interval since the last sample."""
        core, totals = self._core, self._totals
        for live in core.running.values():  # nothing is computed of the others
            request = self._requests.get(live.id)
            if request is not None and live.computed:
                prompt = min(live.computed, live.prompt_len) - request.cached_tokens
                self._serve(request, prompt + live.output_tokens)
        self._sink.sample(
            Sample(
                time=now - self._start,
                running=len(core.running),
                waiting=len(core.queues),
                steps=totals.steps,
                step_seconds=totals.seconds,
                prefill_tokens=totals.prefill_tokens,
                decode_tokens=totals.decode_tokens,
                adapters=totals.adapters,
                kv_used=1.0 - core.blocks.num_free / core.blocks.num_blocks,
                slots_ready=sum([slot.state is SlotState.READY for slot in core.slots.slots]),
                cpu_adapters=len(core.cpu.entries),
                service=json.dumps(self._service, sort_keys=True, separators=(",", ":")),
            )
        )
        self._totals = _Totals()
        self._service.clear()

    def close(self, now: float) -> None:
        """End the recording: record the last interval, and the adapters that are in slots."""
        self.sample(now)
        for slot in sorted(self._spans):
            self._close_span(slot, now)


def due(arrival: Arrival, objective: Objective | None) -> float | None:
    """Return when a request should have ended, by the workload's objective, or else by its own deadline."""
    seconds = arrival.deadline if objective is None else objective(arrival.output_tokens)
    return None if seconds is None else arrival.time + seconds


@dataclass(slots=True)
class _Totals:
    steps: int = 0
    seconds: float = 0.0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    adapters: int = 0
