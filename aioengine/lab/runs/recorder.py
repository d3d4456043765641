"""Turns the events of an engine, or of the engines of a fleet, into records: requests, slots, moves, and
samples at regular times; and whether the policy under test made all decisions."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aioengine import events
from aioengine.engine import AsyncEngine
from aioengine.lab.runs.rows import BASE, Move, RequestRecord, Sample, Sink, SlotSpan
from aioengine.lab.workload.requests import Arrival, Workload
from aioengine.runtime.output import RequestOutput
from aioengine.schedulers.policy import SlotState


class PolicyWatch:
    """Listener that counts where another policy decided."""

    HEARD = (events.StepFinished, events.PolicyFailed, events.PolicyOverran, events.PolicyReplaced)

    def __init__(self) -> None:
        self._counts = {"steps": 0, "fallback_steps": 0, "failures": 0}
        self._is_replaced = False
        self._first: tuple[str | None, str | None] = (None, None)
        """Reason and traceback of the first failure."""

    def __call__(self, event: events.Event) -> None:
        if isinstance(event, events.StepFinished):
            self._counts["steps"] += event.steps
            self._counts["fallback_steps"] += event.steps * self._is_replaced
        elif isinstance(event, events.PolicyReplaced):
            self._is_replaced = True
        elif isinstance(event, events.PolicyFailed):
            self._counts["fallback_steps"] += event.call == "schedule"
            self._failed(event.error, event.traceback)
        elif isinstance(event, events.PolicyOverran):
            self._failed(f"a decision took {event.seconds:.4f} s, the budget is {event.budget:g} s", None)

    def _failed(self, reason: str, traceback: str | None) -> None:
        if not self._counts["failures"]:
            self._first = reason, traceback
        self._counts["failures"] += 1

    def summary(self, name: str) -> dict[str, Any]:
        """Return the part ``policy`` of a summary. A run is valid if every decision and every order of
        eviction was the policy's own, and it heard all events; otherwise its figures are those of another
        policy."""
        reason, traceback = self._first
        valid = not (self._counts["failures"] or self._counts["fallback_steps"])
        return {"name": name, **self._counts, "reason": reason, "traceback": traceback, "valid": valid}


@dataclass(slots=True)
class _Request:
    """A request that has not ended for its caller: what its first attempt was, and all attempts together."""

    arrival: Arrival
    added: events.RequestAdded | None = None
    """None: no engine has accepted it."""
    admitted: float | None = None
    first_token: float | None = None
    cached_tokens: int = 0
    preemptions: int = 0
    output_tokens: int = 0
    worst_gap: float | None = None
    ended: events.RequestEnded | None = None


@dataclass(slots=True)
class _Span:
    adapter: str
    start: float
    ready: float | None = None
    busy_steps: int = 0


class Recorder:
    """Recorder of a run. It holds only what has not ended yet. Slots are numbered throughout: those of the
    second engine follow those of the first.

    Args:
        start: Time of the clock at the start of the run.
        slots: Number of an engine's slots.
        delay: Seconds that a message of a replica takes to the gateway; None: there is no gateway.
        listener: Called with the events of all engines, too.
    """

    def __init__(
        self,
        sink: Sink,
        workload: Workload,
        *,
        start: float,
        slots: int = 0,
        delay: float | None = None,
        listener: PolicyWatch | None = None,
    ) -> None:
        self.ended = 0
        """Requests that have ended, the refused ones included."""
        self.last_progress = start
        """When a step or a move ended last."""
        self.sink = sink
        self.start = start
        self.requests: dict[str, _Request] = {}
        self.totals: Counter[str] = Counter()
        """Counts of steps since the last sample, by its fields."""
        self.step_seconds = 0.0
        self.service: Counter[str] = Counter()
        self._ranks = {shape.name: shape.rank for shape in workload.adapters}
        self._objective = workload.objective
        self._slots = slots
        self._delay = delay
        self._listener = listener
        self._engines: dict[int, _EngineRecorder] = {}

    def watch(self, engine: AsyncEngine, index: int = 0) -> Callable[[float], None]:
        """Record this engine's events as those of replica ``index``; returns a function that ends it at a
        time."""
        recorder = self._engines[index] = _EngineRecorder(self, engine, self._slots * index)
        removers = [engine.add_listener(recorder, *recorder.on)]
        if self._listener is not None:
            removers.append(engine.add_listener(self._listener, *self._listener.HEARD))

        def unwatch(now: float) -> None:
            for remove in removers:
                remove()
            recorder.count_service()
            recorder.close(now)
            if self._engines.get(index) is recorder:
                del self._engines[index]

        return unwatch

    @property
    def since_token(self) -> int:
        """Steps and moves that have ended since a request had a token, or ended; on the engine with the most
        of them."""
        return max((engine.since_token for engine in self._engines.values()), default=0)

    def expect(self, request_id: str, arrival: Arrival) -> None:
        """Announce a request before it is sent."""
        self.requests[request_id] = _Request(arrival)

    def settled(
        self, request_id: str, now: float, error: Exception | None, output: RequestOutput | None = None
    ) -> None:
        """Write the row of a request that has ended for its caller. ``output`` is what its caller has; a
        replica that was cut off may have generated more."""
        request = self.requests.pop(request_id)
        arrival, added, ended = request.arrival, request.added, request.ended
        self.ended += 1
        time, first_token, over, reason = arrival.time, request.first_token, now, "error"
        if self._delay is None:
            time = time if added is None else added.time - self.start
            over = now if ended is None else ended.time
        elif first_token is not None:
            first_token += self._delay
        if added is None:
            reason = "refused"
        elif error is None and ended is not None:
            reason = ended.reason
        seconds = arrival.deadline if self._objective is None else self._objective(arrival.output_tokens)
        self.sink.request(
            RequestRecord(
                request_id=request_id,
                adapter=arrival.adapter,
                tenant=arrival.tenant,
                prompt_tokens=arrival.prompt_tokens if added is None else added.prompt_tokens,
                output_tokens=request.output_tokens if output is None else output.output_tokens,
                arrival=time,
                admitted=request.admitted,
                first_token=first_token,
                ended=over - self.start,
                reason=reason,
                found=None if added is None else added.location,
                cached_tokens=request.cached_tokens,
                preemptions=request.preemptions,
                worst_gap=request.worst_gap,
                deadline=None if seconds is None else arrival.time + seconds,
                rank=self._ranks.get(arrival.adapter or "", 0),
                error=None if error is None else type(error).__name__,
            )
        )

    def sample(self, now: float) -> None:
        """Record the interval since the last sample."""
        engines = list(self._engines.values())
        stats = [engine.engine.stats() for engine in engines]  # simulated engines take in what has ended
        for engine in engines:
            engine.count_service()
        cores = [engine.core for engine in engines]
        free = [one.kv_blocks_free / one.kv_blocks for one in stats]
        counted = ("prefill_tokens", "decode_tokens", "adapters")
        self.sink.sample(
            Sample(
                time=now - self.start,
                running=sum(one.running for one in stats),
                waiting=sum(one.waiting for one in stats),
                steps=self.totals["steps"],
                step_seconds=self.step_seconds,
                **{name: self.totals[name] for name in counted},
                kv_used=1.0 - sum(free) / max(len(free), 1) if free else 0.0,
                slots_ready=sum(slot.state is SlotState.READY for core in cores for slot in core.slots.slots),
                cpu_adapters=sum(len(core.cpu.entries) for core in cores),
                service=json.dumps(self.service, sort_keys=True, separators=(",", ":")),
            )
        )
        self.totals.clear()
        self.step_seconds = 0.0
        self.service.clear()

    def close(self, now: float) -> None:
        """End the recording: record the last interval, and the adapters that are in slots."""
        self.sample(now)
        for engine in self._engines.values():
            engine.close(now)


class _EngineRecorder:
    """Listener of one engine's events."""

    def __init__(self, run: Recorder, engine: AsyncEngine, first_slot: int) -> None:
        self.engine = engine
        self.since_token = 0
        self._run = run
        self.core = engine._core  # how far each request has come is in no event
        self._first_slot = first_slot
        self._clients: dict[str, str] = {}
        """Whom the service of each request counts for."""
        self._served: Counter[str] = Counter()
        """Tokens computed for each request that samples have counted."""
        self._cached: dict[str, int] = {}
        self._moves: dict[tuple[str, str, int], tuple[float, int]] = {}
        """Begin and slot of each move under way, by stage, adapter and version."""
        self._spans = {
            slot.index: _Span(slot.adapter, run.start, run.start)
            for slot in engine.stats().slots
            if slot.adapter is not None
        }
        self.on: dict[type[events.Event], Callable[[Any], None]] = {
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
            events.StepFinished: self._steps,
        }

    def __call__(self, event: events.Event) -> None:
        self.on[type(event)](event)

    # Requests

    def _added(self, event: events.RequestAdded) -> None:
        self._clients[event.request_id] = event.tenant or event.adapter or BASE
        request = self._run.requests.get(event.request_id)
        if request is not None and request.added is None:
            request.added = event

    def _admitted(self, event: events.RequestAdmitted) -> None:
        if event.resumed:
            return
        self._cached[event.request_id] = event.cached_tokens
        request = self._run.requests.get(event.request_id)
        if request is not None and request.admitted is None:
            request.admitted = event.time - self._run.start
            request.cached_tokens = event.cached_tokens

    def _preempted(self, event: events.RequestPreempted) -> None:
        if request := self._run.requests.get(event.request_id):
            request.preemptions += 1

    def _first_token(self, event: events.FirstToken) -> None:
        self.since_token = 0
        request = self._run.requests.get(event.request_id)
        if request is not None and request.first_token is None:
            request.first_token = event.time - self._run.start

    def _ended(self, event: events.RequestEnded) -> None:
        self.since_token = 0
        name = event.request_id
        cached = self._cached.pop(name, None)
        if cached is not None and event.output_tokens:
            self._serve(name, event.prompt_tokens - cached + event.output_tokens)
        self._served.pop(name, None)
        self._clients.pop(name, None)
        if request := self._run.requests.get(name):
            request.output_tokens += event.output_tokens
            request.ended = event
            if event.worst_gap is not None:
                request.worst_gap = max(request.worst_gap or 0.0, event.worst_gap)

    def _serve(self, request_id: str, tokens: int) -> None:
        """Add the tokens that have been computed for a request since it was accepted."""
        more = tokens - self._served[request_id]
        if request_id in self._clients and more > 0:  # less after a preemption: it is not counted twice
            self._run.service[self._clients[request_id]] += more
            self._served[request_id] = tokens

    def count_service(self) -> None:
        """Count what has been computed for the running requests; nothing is computed of the others."""
        for live in self.core.running.values():
            if live.computed and live.id in self._cached:
                prompt = min(live.computed, live.prompt_len) - self._cached[live.id]
                self._serve(live.id, prompt + live.output_tokens)

    # Adapters

    def _loading(self, event: events.AdapterLoading) -> None:
        self._moves["disk", event.adapter, event.version] = event.time, -1

    def _loaded(self, event: events.AdapterLoaded) -> None:
        self._moved("disk", event, event.nbytes)

    def _placing(self, event: events.AdapterPlacing) -> None:
        self._moves["slot", event.adapter, event.version] = event.time, event.slot
        self._close_span(event.slot, event.time)  # a copy that was lost with the device leaves one
        self._spans[event.slot] = _Span(event.adapter, event.time)

    def _placed(self, event: events.AdapterPlaced) -> None:
        self._moved("slot", event, event.nbytes)
        if event.slot in self._spans:
            self._spans[event.slot].ready = event.time

    def _evicted(self, event: events.AdapterEvicted) -> None:
        if event.slot is not None:
            self._close_span(event.slot, event.time)

    def _failed(self, event: events.AdapterFailed) -> None:
        for stage in ("slot", "disk"):
            under_way = self._moves.get((stage, event.adapter, event.version))
            if under_way is not None:
                self._moved(stage, event, 0, type(event.error).__name__)
                self._close_span(under_way[1], event.time)
                return

    def _moved(self, stage: str, event: events.AdapterEvent, nbytes: int, error: str | None = None) -> None:
        start, _ = self._moves.pop((stage, event.adapter, event.version), (event.time, -1))
        self._run.last_progress = event.time
        self.since_token += 1
        begin, end = start - self._run.start, event.time - self._run.start
        self._run.sink.move(Move(stage, event.adapter, begin, end, nbytes, error))

    def _close_span(self, slot: int, now: float) -> None:
        span = self._spans.pop(slot, None)
        if span is not None:
            start, number = self._run.start, slot + self._first_slot
            ready = None if span.ready is None else span.ready - start
            self._run.sink.span(
                SlotSpan(number, span.adapter, span.start - start, ready, now - start, span.busy_steps)
            )

    def close(self, now: float) -> None:
        for slot in sorted(self._spans):
            self._close_span(slot, now)

    # Steps

    def _steps(self, event: events.StepFinished) -> None:
        run, spans, count = self._run, self._spans, event.steps
        run.last_progress = event.time
        self.since_token = 0 if event.decode_tokens else self.since_token + count
        totals = run.totals
        totals["steps"] += count
        run.step_seconds += event.seconds
        totals["prefill_tokens"] += count * event.prefill_tokens
        totals["decode_tokens"] += count * event.decode_tokens
        totals["adapters"] += count * event.adapters
        for slot in event.slots:
            spans[slot].busy_steps += count
