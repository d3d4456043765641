"""The engine's core: a deterministic state machine over requests, slots and KV blocks.

No I/O, no clock, no torch. Events go in (a request is added or aborted, an adapter is on the CPU or in its
slot, a load failed, a step finished), each with ``now``. ``schedule(now)`` answers with a batch to run and
adapter moves to start. The policy only proposes: the core checks every proposal and keeps every invariant.

The file is long because each event has its method here. The parts (batcher, queues, residency, guard) do the
work.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from math import inf, nextafter
from typing import NamedTuple

from sortedcontainers import SortedDict

from aioengine import events
from aioengine.core.adapters.cpu_cache import least_recently_used
from aioengine.core.adapters.moves import Move
from aioengine.core.adapters.placing import Placing, adapters_shut_out
from aioengine.core.adapters.residency import Residency
from aioengine.core.batcher import Batcher, decode_row
from aioengine.core.blocks import BlockManager
from aioengine.core.costs import MeasuredCosts
from aioengine.core.decodes.counted import CountedDecodes
from aioengine.core.guard import PolicyGuard
from aioengine.core.limits import CoreLimits
from aioengine.core.pacing import Pacer, StepWork
from aioengine.core.prefixes.pins import PrefixPins
from aioengine.core.queues import RequestQueues
from aioengine.core.speculation.drafts import Speculation
from aioengine.core.state import AdapterEntry, Request, Status, label_of, location_name, where_is
from aioengine.core.step_results import Steady, StepResults
from aioengine.core.view import CoreView
from aioengine.core.waiting_room import Ticket, WaitingRoom
from aioengine.errors import (
    AdapterChanged,
    AdapterError,
    DeadlineExceeded,
    EngineOverloaded,
    RequestRejected,
)
from aioengine.request import RequestOptions, SamplingParams
from aioengine.schedulers.policies.fcfs import FCFS
from aioengine.schedulers.policy import CostsView, Location, PolicyEvent, SchedulerPolicy
from aioengine.step import CountedRows, Decodes, LoadedAdapter, Sampled, SequenceWork, StepBatch, StepResult


class Step(NamedTuple):
    """Result of ``schedule``: a batch to run (None if nothing can run now), and moves to start."""

    batch: StepBatch | None
    moves: Sequence[Move]


class Core:
    """All methods are synchronous and must be called from one thread.

    Events are appended to ``outbox``, a list of :class:`~aioengine.events.Event`, which the caller empties.
    ``timer`` and ``processor`` measure the policy's decisions; the core itself has no clock. ``costs`` tells
    policies how long steps and moves take, where that is known beforehand; otherwise times are measured. Each
    batch that ``schedule`` returns must come back through ``step_finished`` before ``schedule`` is called
    again.
    """

    def __init__(
        self,
        limits: CoreLimits,
        policy: SchedulerPolicy,
        *,
        timer: Callable[[], float] | None = None,
        processor: Callable[[], float] | None = None,
        costs: CostsView | None = None,
    ) -> None:
        self.limits = limits
        self.outbox: list[events.Event] = []
        self.residency = Residency(
            num_slots=limits.num_slots,
            cpu_capacity=limits.cpu_capacity,
            max_loads=limits.max_loads,
            emit=self._emit,
            tell=self._tell,
            slot_bytes=limits.slot_bytes,
            slot_memory=limits.slot_memory,
            cpu_max_bytes=limits.cpu_max_bytes,
            cpu_order=self._cpu_order,
        )
        self.blocks = BlockManager(
            limits.num_blocks,
            limits.block_size,
            prefix_caching=limits.prefix_caching,
            window=limits.window,
            pins=PrefixPins(limits.max_pinned_blocks, limits.max_pinned_blocks_per_tenant),
        )
        self.running: dict[int, Request] = {}
        """The running requests by ``seq``, in order of admission."""
        self.room = WaitingRoom(
            limits.max_waiting,
            limits.max_waiting_per_tenant,
            limits.max_waiting_per_adapter,
            max_tokens=limits.max_waiting_tokens,
            max_tokens_per_tenant=limits.max_waiting_tokens_per_tenant,
        )
        self.queues = RequestQueues(self.room)
        self.placing = Placing(self.residency)
        self.slots = self.residency.slots
        self.cpu = self.residency.cpu
        self.by_policy_name = self.residency.by_policy_name
        self._speculation = None if limits.speculation == "none" else Speculation()
        self.batcher = Batcher(
            self.blocks,
            self.queues,
            self.running,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            pacer=_pacer(limits),
            speculation=self._speculation,
            draft_constrained=limits.draft_constrained,
            max_model_len=limits.max_model_len,
            emit=self._emit,
            tell=self._tell,
            refuse=self._refuse,
        )
        self.requests: dict[str, Request] = {}
        """Requests that are accepted and have not ended."""
        self.now = 0.0
        self.step = 0
        self.guard = PolicyGuard(
            policy,
            FCFS,
            requests=self.requests,
            adapters=self.by_policy_name,
            emit=self._emit,
            refuse=self._refuse,
            timer=timer,
            processor=processor,
            budget=limits.policy_time_budget,
            max_overruns=limits.policy_max_overruns,
        )
        self._measures = costs is None
        self._last_token: Callable[[Request], Sampled] = lambda request: Sampled(0)
        """Returns the last token of a request whose decodes are counted."""
        self._costs = MeasuredCosts(self.residency.by_policy_name, limits, self.batcher.pacer)
        self._results = StepResults(
            blocks=self.blocks,
            advance=self.batcher.advance,
            speculation=self._speculation,
            end=self.end,
            emit=self._emit,
            note=lambda event: self.outbox.append(event),
        )
        self._view = CoreView(
            self.residency,
            self.queues,
            self.batcher,
            costs or self._costs,
            self.guard.refusals,
        )
        self._rng = random.Random(limits.seed)
        self._next_seq = 0
        self._changes = 0
        """Number of events so far; tokens of running requests do not count."""
        self._arranged_at = -1
        """Value of ``_changes`` when pinned adapters were last placed."""
        self._deadlines: SortedDict[tuple[float, int], Request] = SortedDict()
        self._in_flight: list[Request] = []
        """The requests of the step in flight."""
        self._repeated: list[Request] = []
        """The requests of the steps that ``steps_finished`` took in last."""
        self._zombies: list[Request] = []
        """Requests that ended while in flight. Their blocks and slots are released when the step comes
        back."""

    # Events in: requests

    def reserve(
        self, tenant: str | None, adapters: Sequence[str], now: float, tokens: int | None = None
    ) -> Ticket:
        """Reserve a waiting place for a later ``add_request``, for the adapters of these names. ``tokens`` is
        the length of its prompt; if that is not known yet, ``weigh`` follows.

        Another tenant's request may be displaced for it: see :mod:`aioengine.core.waiting_room`.

        Raises EngineOverloaded if there is none.
        """
        try:
            return self.room.enter(tenant, adapters, now, tokens)
        except EngineOverloaded as error:
            self._refused(error, tenant, adapters, now)
            raise

    def weigh(self, ticket: Ticket, tokens: int, now: float) -> None:
        """Count the tokens of a prompt whose place was reserved. Raises EngineOverloaded if they are too
        many."""
        try:
            self.room.weigh(ticket, tokens, now)
        except EngineOverloaded as error:
            self._refused(error, ticket.tenant, ticket.adapters, now)
            raise

    def _refused(
        self, error: EngineOverloaded, tenant: str | None, adapters: Sequence[str], now: float
    ) -> None:
        bound = "server" if error.bound is None else error.bound
        adapter = error.adapter or next(iter(adapters), None)
        self._emit(events.RequestRefused(time=now, adapter=adapter, tenant=tenant, bound=bound))

    def add_request(
        self,
        request_id: str,
        prompt: list[int],
        params: SamplingParams,
        options: RequestOptions,
        now: float,
        *,
        adapter: AdapterEntry | None = None,
        deadline: float | None = None,
        scale: float = 1.0,
        ticket: Ticket | None = None,
        given: Sequence[int] = (),
    ) -> Request:
        """Accept a request (its prompt already checked against ``max_model_len``).

        ``scale`` is what its adapter is multiplied by. ``given`` is unfinished output of another engine; the
        request continues it.

        ``adapter`` is the version for the adapter's name in ``options``, and ``deadline`` the time when the
        request must have ended. ``ticket`` is its place among the waiting requests. Without one, raises
        EngineOverloaded as ``reserve`` does.
        """
        assert request_id not in self.requests
        if ticket is None:
            names = () if adapter is None else (adapter.label,)
            ticket = self.reserve(options.tenant, names, now, len(prompt))
        seed = params.seed if params.seed is not None else self._rng.getrandbits(63)
        request = Request(
            request_id,
            prompt,
            params,
            adapter=adapter,
            seq=self._next_seq,
            arrival=now,
            seed=seed,
            deadline=deadline,
            options=options,
            scale=scale,
            given=given,
            cache=self.blocks,
        )
        request.stops = params.stop_token_ids
        if not params.ignore_eos:
            request.stops = (*request.stops, *self.limits.eos_token_ids)
        request.most_tokens = min(request.most_tokens, self.limits.max_model_len)
        request.ticket = ticket
        ticket.displaced = lambda error, now: self.end(request, "error", now, error)
        self._next_seq += 1
        self.requests[request_id] = request
        self.queues.add(request)
        if deadline is not None:
            self._deadlines[deadline, request.seq] = request
        self._emit(
            events.RequestAdded(
                time=now,
                request_id=request_id,
                adapter=label_of(request),
                prompt_tokens=len(prompt),
                tenant=options.tenant,
                location=None if adapter is None else location_name(adapter),
                priority=options.priority,
                deadline=deadline,
            )
        )
        self._tell("request_added", now, request=request)
        return request

    def end(
        self,
        request: Request,
        reason: events.EndReason,
        now: float,
        error: Exception | None = None,
    ) -> None:
        """End a request; its blocks and its claim on the slot are released now, or when the step in flight
        comes back."""
        if request.status is Status.ENDED:
            return
        waited = request.status is Status.WAITING
        if waited:
            self.queues.remove(request)
        else:
            del self.running[request.seq]
            if self.batcher.stop_counting(request) or request in self._in_flight:
                self._zombies.append(request)
            else:
                self.batcher.release(request)
        request.status = Status.ENDED
        if request.deadline is not None:
            del self._deadlines[request.deadline, request.seq]
        self._tell("request_finished", now, request=request)
        del self.requests[request.id]
        request.drop_view()
        sink, request.sink = request.sink, None
        if sink is not None:
            sink.end(reason, error)
        self._emit(
            events.RequestEnded(
                time=now,
                request_id=request.id,
                adapter=label_of(request),
                reason=reason,
                error=error,
                prompt_tokens=request.prompt_len,
                output_tokens=request.made_tokens,
                seconds=now - request.arrival,
                tenant=request.options.tenant,
                worst_gap=request.worst_gap,
            )
        )

    # Events in: adapters

    def adapter_loaded(self, entry: AdapterEntry, now: float, found: LoadedAdapter) -> AdapterError | None:
        """Take in an adapter that has been read.

        Returns the reason if it can never be kept; the requests that wait for it fail with this reason.

        Otherwise it is in the cache, or dropped if there is no room for its bytes beside the adapters that
        others need. Then it is read again when there is room.
        """
        self.now = max(self.now, now)
        error = (
            self.residency.changed(entry, found.digest)
            or self.residency.refusal(entry, found.bytes_in_slot)
            or self.cpu.refusal(entry, found.nbytes, self.slots.places_of(found.bytes_in_slot))
        )
        if error is not None:
            self.residency.load_refused(entry, now, error)
            self._fail_waiting(entry, now, error)
        else:
            self.residency.loaded(entry, now, found)
            if not entry.scalable:
                self._fail_scaled(entry, now)
        return error

    def adapter_load_cancelled(self, entry: AdapterEntry) -> None:
        """Note that a read was cancelled because the engine stops; no request is told."""
        self._changes += 1
        self.residency.load_cancelled(entry)

    def adapter_load_stalled(self, entry: AdapterEntry) -> None:
        """Note that a read makes no progress: it goes on, but another may start in its place."""
        self._changes += 1
        self.residency.load_stalled(entry)

    def adapter_load_failed(
        self, entry: AdapterEntry, now: float, error: Exception, reason: events.LoadFailure
    ) -> None:
        """Fail the requests that wait for this adapter with ``error``; no other request is affected."""
        self.residency.load_failed(entry, now, error, reason)
        self._fail_waiting(entry, now, error)

    def adapter_placed(self, entry: AdapterEntry, now: float, seconds: float) -> None:
        if self.residency.placed(entry, now, seconds):
            self._tell("adapter_placed", now, adapter=entry.name)

    def adapter_place_failed(self, entry: AdapterEntry, now: float, error: Exception) -> None:
        self.residency.place_failed(entry, now, error)
        self._fail_waiting(entry, now, error)

    def _fail_waiting(self, entry: AdapterEntry, now: float, error: Exception) -> None:
        """Fail the requests that wait for it."""
        for request in list(entry.waiting):
            self.end(request, "error", now, error)

    def _fail_scaled(self, entry: AdapterEntry, now: float) -> None:
        """Fail the requests that scale an adapter which has become one that a step cannot scale."""
        error = AdapterChanged(
            "its files have changed to a kind that is scaled in another way; try again",
            name=entry.label,
            path=entry.path,
            transient=True,
        )
        for request in [request for request in entry.waiting if request.scale != 1.0]:
            self.end(request, "error", now, error)

    def _fail_shut_out(self, now: float) -> None:
        """Fail the requests for adapters that can never run, because pinned ones leave no slot, or no room in
        the slots' memory."""
        if self.residency.pins.count:
            for entry, error in adapters_shut_out(self.queues.heads.values(), self.slots):
                self._fail_waiting(entry, now, error)

    # Scheduling

    def schedule(self, now: float, again: StepBatch | None = None) -> Step:
        """Decide the next step. Nothing may be in flight.

        ``again`` is a batch whose repetitions ``steps_finished`` has taken in, where the device can repeat it
        further. The step has this very batch if it is to be repeated.
        """
        assert not self._in_flight
        self.now = now
        self.expire(now)
        self.blocks.expire(now)
        changed = self._changes != self._arranged_at
        if changed:
            self._fail_shut_out(now)
        self.residency.sweep(
            now
        )  # after the calls that end requests: one may be the last of a retired adapter
        if changed or self.placing.pinned_wait:
            self.placing.place_pinned(now)
            self._arranged_at = self._changes
        self._view.advance(now, self.step)
        decision = self.guard.decide(self._view, self._changes)
        for request, why in decision.reject:
            self._reject(request, why, now)
        for request in decision.preempt:
            if request.status is Status.RUNNING:
                self.batcher.preempt(request, now)
            else:
                self._refuse("preempt_not_running", request.id)
        for reason, item in self.placing.apply(decision, now):
            self._refuse(reason, item)
        admit = decision.admit
        batch = None if admit or again is None else self._repeat(again)
        if batch is None:
            batch = self._form_batch(admit)
        self.guard.carried_out(decision, self._changes)
        return Step(batch, self.residency.take_moves())

    def _reject(self, request: Request, reason: str, now: float) -> None:
        """End a request by the policy's decision, if it has never run."""
        if request.status is not Status.WAITING or request.admitted is not None:
            self._refuse("reject_already_started", request.id)
            return
        text = f"request {request.id!r} was rejected: {reason or 'the scheduling policy gives no reason'}"
        self.end(request, "error", now, RequestRejected(f"{text}; try again later", reason=reason))

    def step_lost(self) -> None:
        """Note that what is in flight is lost. Blocks and slots of its ended requests are released."""
        self._in_flight = []
        if self.batcher.counted is not None:
            self.batcher.counted.in_flight = False
            self.batcher.counted.leave_all()
        for request in self._zombies:
            self.batcher.release(request)
        self._zombies = []

    def device_lost(self, now: float, error: Exception) -> None:
        """Forget everything that was computed and loaded. Running requests fail with ``error``, waiting ones
        keep waiting, and adapters are on disk again. The caller must not report batches or moves that were
        under way."""
        self.now = max(self.now, now)
        self._changes += 1
        self.step_lost()
        for request in list(self.running.values()):
            self.end(request, "error", now, error)
        self.blocks.forget()
        self.residency.device_lost(now)

    def next_due(self) -> float | None:
        """Return the time when ``schedule`` must be called even if nothing else happens."""
        times = self.next_deadline(), self.placing.next_retry(self.now), self.blocks.pins.next_end
        return min((at for at in times if at is not None), default=None)

    def next_ask(self) -> float:
        """Return the time before which the policy wants not to be asked unless there is an event."""
        return self.guard.quiet_until(self._changes)

    def next_deadline(self) -> float | None:
        """Return the earliest deadline of a request."""
        return self._deadlines.peekitem(0)[0][0] if self._deadlines else None

    def expire(self, now: float) -> None:
        """End the requests whose deadline has passed; ``schedule`` does it too."""
        while (due := self.next_deadline()) is not None and due <= now:
            request = self._deadlines.peekitem(0)[1]
            late = f"request {request.id!r}{where_is(request.adapter)}: its deadline passed "
            late += f"{now - due:.3f} s ago with "
            late += f"{request.output_tokens} of {request.params.max_tokens} tokens generated"
            self.end(request, "error", now, DeadlineExceeded(late))

    # The batch

    def _form_batch(self, admit: Sequence[Request]) -> StepBatch | None:
        repeated = self.batcher.repeated
        rows = None
        if not admit:
            rows = self.batcher.repeat(self.now, self._changes)
        if rows is not None and repeated is not None:
            self._in_flight = repeated.requests
            self._begin(rows.rows)
            batch = StepBatch(self.step, rows, self.slots.ranks())
            repeated.begun(batch)
            return batch
        if self.placing.any_closed:
            admit = [request for request in admit if not self.placing.is_closed(request)]
        ranks = self.slots.ranks()
        self._in_flight, work = self.batcher.form(admit, self.now, ranks)
        counted = None if self.batcher.counted is None else self.batcher.counted.rows()
        if not work and counted is None:
            if repeated is not None:
                repeated.spoil()
            return None
        self._begin(work, counted)
        batch = StepBatch(self.step, work, ranks, counted=counted)
        if repeated is not None:
            plain = counted is None and not self.batcher.has_prompts
            if plain and len(work) == len(self.running):
                repeated.note(batch, self._in_flight, self._changes)
            else:
                repeated.spoil()
        return batch

    def _begin(self, work: Sequence[SequenceWork], counted: CountedRows | None = None) -> None:
        """Count a step, and note which slots it uses."""
        self.step += 1
        used: list[int] = []
        last = -1
        if counted is not None and self.batcher.counted is not None:
            self.batcher.counted.in_flight = True
            used = [slot for slot, _ in counted.slots]
        for row in work:
            if row.slot != last:  # they are sorted by slot
                last = row.slot
                used.append(last)
        slots, now = self.slots.slots, self.now
        for index in used:
            if index >= 0:
                slot = slots[index]
                if (entry := slot.entry) is not None:
                    slot.last_used = entry.last_used = now

    def step_finished(
        self, batch: StepBatch, result: StepResult, now: float
    ) -> tuple[events.TokenInterval, ...]:
        """Pass a step's tokens on to the requests' sinks, and end the requests that are done.

        Returns the times between these tokens and the ones before.
        """
        self.learn(batch, result.seconds)
        ending = self._counted_ending()
        self._counted_ended(batch, (now,))
        requests, self._in_flight = self._in_flight, []
        ended, self._zombies = self._zombies, []
        for request in ended:
            self.batcher.release(request)
        if ending:  # nothing else was in the step, but what is counted
            requests, batch = ending, batch._replace(sequences=[decode_row(request) for request in ending])
            result = StepResult([self._last_token(request) for request in ending], result.seconds)
        intervals = self._results.take(requests, batch, result, now)
        if self.batcher.repeated is not None:
            self.batcher.repeated.ended(self._changes, all_decoded=self._results.all_decoded)
        return intervals

    def steady(self, batch: StepBatch) -> Steady | None:
        """Return which repetitions of ``batch``, which is in flight, are certain, if all running requests
        decode in it. None if one ends in it, or if each step does more than to decode."""
        if (
            self.batcher.has_prompts
            or self._speculation is not None
            or self.blocks.window is not None  # blocks are given back from step to step
            or self._zombies
            or self._costs.learner is not None
            or len(self._in_flight) + _sequences(batch.counted) != len(self.running)
        ):
            return None
        steps = self._results.steady_steps(self._in_flight, batch, self.batcher.counted)
        return Steady(steps, self.again_until()) if steps > 1 else None

    def again_until(self) -> float:
        """Return the time until which neither the policy nor the core has anything to decide, so that what is
        in flight is repeated. If they may have something at any time, it is the moment after the present."""
        until = self.guard.quiet_until(self._changes)
        if self.placing.pinned_wait or self.residency.any_wanted:
            until = -inf
        due = self.next_due()
        return max(nextafter(self.now, inf), until if due is None else min(due, until))

    def _repeat(self, batch: StepBatch) -> StepBatch | None:
        """Begin a repeated batch once more. Returns None if it would be another one now."""
        requests, running, counted = self._repeated, Status.RUNNING, self.batcher.counted
        if counted is not None and not counted.are(batch.counted):
            return None
        several = len(requests) + _sequences(batch.counted)
        if several != len(self.running) or not all(request.status is running for request in requests):
            return None
        size = self.blocks.block_size
        for request in self.running.values() if requests else ():
            if request.counted is None and request.computed >= len(request.blocks) * size:
                request.blocks += self.blocks.allocate(1)  # it is free: see ``steady``
        if counted is not None:
            counted.allocate()
        self._in_flight = requests
        self._begin(batch.sequences, batch.counted)
        return batch

    def steps_finished(
        self, batch: StepBatch, token: Sampled, ends: Sequence[float], *, goes_on: bool = False
    ) -> list[tuple[events.TokenInterval, ...]]:
        """Take in ``batch`` and its repetitions, of which ``steady`` has said that they are certain. Every
        sequence got ``token`` in each step. With ``goes_on`` one more repetition, which is certain too, is in
        flight then, as ``batch``. Returns the intervals of each, as ``step_finished`` does."""
        requests = self._in_flight
        if self.batcher.repeated is not None:
            self.batcher.repeated.spoil()
        if not goes_on:
            self._repeated = requests
        if self._zombies:  # the steps before were taken in when one of the requests was ended
            assert len(ends) == 1 and not goes_on
            return [self.step_finished(batch, StepResult([token] * len(requests), 0.0), ends[0])]
        if not goes_on:
            self._in_flight = []
        found = self._results.take_many(
            requests, token, ends, self.running.values(), begun=len(ends) + goes_on
        )
        again = len(ends) - 1 + goes_on
        if again:
            self.now = ends[again - 1]
            self._begin(batch.sequences, batch.counted)
            self.step += again - 1
        self._counted_ended(batch, ends, goes_on=goes_on)
        return found

    def _counted_ending(self) -> list[Request]:
        """Return the counted requests that end in the step that has ended, in the order of its rows."""
        counted = self.batcher.counted
        if counted is None:
            return []
        ending = counted.take_ending()
        if len(ending) > 1:
            place = {seq: place for place, seq in enumerate(self.running)}
            ending.sort(key=lambda request: (request.slot_at(request.computed), place[request.seq]))
        return ending

    def _counted_ended(self, batch: StepBatch, ends: Sequence[float], *, goes_on: bool = False) -> None:
        counted = self.batcher.counted
        if counted is not None and batch.counted is not None:
            counted.in_flight = goes_on
            counted.ended(ends, begun=len(ends) + goes_on)

    def counts_intervals(self, wanted: bool) -> None:
        """Set whether ``step_finished`` and ``steps_finished`` return the intervals; at first they do."""
        self._results.counts_intervals = wanted
        if self.batcher.counted is not None:
            self.batcher.counted.wanted = not wanted

    def count_decodes(
        self, token: Sampled, final: Callable[[Request], int], last: Callable[[Request], Sampled]
    ) -> None:
        """Count plain decodes (:mod:`aioengine.core.decodes.counted`), if nothing that this core does needs
        to know each of them. The device gives ``token`` to each but the last one, which it gives ``last``;
        with that token a request has ``final`` tokens."""
        limits = self.limits
        if not (
            limits.prefix_caching
            or limits.window is not None
            or limits.max_step_seconds is not None
            or limits.speculation != "none"
            or self._measures
        ):
            self._last_token = last
            self.batcher.counted = CountedDecodes(self.blocks, token, final)
            self.batcher.counted.wanted = not self._results.counts_intervals

    def learn(self, batch: StepBatch, seconds: float) -> None:
        """Learn from a step's time; ``step_finished`` does it too."""
        learner = self._costs.learner
        if learner is not None and batch.sequences:
            rows, repeated = batch.sequences, self.batcher.repeated
            if type(rows) is Decodes and repeated is not None:
                learner.learn(repeated.work(rows), seconds)
                return
            learner.learn(StepWork.of(rows, batch.slot_ranks), seconds)

    # Telling others

    def _emit(self, event: events.Event) -> None:
        self._changes += 1
        self.outbox.append(event)

    def _refuse(self, reason: str, item: str) -> None:
        self.guard.refuse(reason, item)
        self._emit(events.PolicyRefused(time=self.now, reason=reason, item=item))

    def _cpu_order(self, entries: Sequence[AdapterEntry]) -> Sequence[AdapterEntry]:
        """Return the policy's order of eviction from the CPU cache. Adapters that it does not name follow by
        last use. Versions that were never published come first, because the policy does not know them."""
        unknown: list[AdapterEntry] = []
        rest: dict[str, AdapterEntry] = {}
        for entry in least_recently_used(entries):
            if self.residency.is_known(entry):
                rest[entry.name] = entry
            else:
                unknown.append(entry)
        self._view.advance(self.now, self.step)
        named = self.guard.cpu_victims(self._view, list(rest)) if len(rest) > 1 else []
        first = [rest.pop(name) for name in dict.fromkeys(named) if name in rest]
        return [*unknown, *first, *rest.values()]

    def _tell(
        self,
        kind: str,
        now: float,
        *,
        request: Request | None = None,
        adapter: str | None = None,
        was: str | None = None,
    ) -> None:
        self._changes += 1
        view = None
        if request is not None:
            view = request.view
            adapter = view.adapter
        self.guard.tell(PolicyEvent(kind, now, view, adapter, was))

    def check(self) -> None:
        """Assert every invariant; for tests, and cheap enough to run whenever the engine is idle."""
        self.residency.check()
        holders = [*self.running.values(), *self._zombies]
        counted = self.batcher.counted
        self.blocks.check([*(r.held for r in holders), [] if counted is None else counted.blocks])
        if counted is not None:
            counted.check(self.running.values())
        using: dict[int, int] = {}
        for request in holders:
            if request.adapter is not None:
                assert request.adapter.location is Location.SLOT
                using[request.adapter.uid] = using.get(request.adapter.uid, 0) + 1
        assert all(e.running == using.get(e.uid, 0) for e in self.residency.entries.values())
        assert len(self.requests) == len(self.running) + len(self.queues)
        assert len(self.running) <= self.limits.max_num_seqs
        assert len(self._deadlines) == sum(r.deadline is not None for r in self.requests.values())
        self.queues.check()
        for request in self.queues:
            assert request.status is Status.WAITING and not request.blocks


def _sequences(rows: CountedRows | None) -> int:
    return 0 if rows is None else rows.sequences


def _pacer(limits: CoreLimits) -> Pacer | None:
    if limits.max_step_seconds is None:
        return None
    return Pacer(limits.max_step_seconds, limits.pair_tokens)
