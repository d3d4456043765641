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
from math import inf
from typing import NamedTuple

from sortedcontainers import SortedDict

from aioengine import events
from aioengine.core.adapters.cpu_cache import least_recently_used
from aioengine.core.adapters.moves import Move
from aioengine.core.adapters.placing import Placing, adapters_shut_out
from aioengine.core.adapters.residency import Residency
from aioengine.core.batcher import Batcher
from aioengine.core.blocks import BlockManager
from aioengine.core.costs import MeasuredCosts
from aioengine.core.guard import PolicyGuard
from aioengine.core.limits import CoreLimits
from aioengine.core.pacing import Pacer
from aioengine.core.prefixes.pins import PrefixPins
from aioengine.core.queues import RequestQueues
from aioengine.core.speculation.drafts import Speculation
from aioengine.core.state import AdapterEntry, Request, Status, label_of, location_name, where_is
from aioengine.core.step_results import StepResults, TokensBefore, token_intervals
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
from aioengine.step import LoadedAdapter, StepBatch, StepContents, StepResult


class Step(NamedTuple):
    """Result of ``schedule``: a batch to run (None if nothing can run now), and moves to start."""

    batch: StepBatch | None
    moves: Sequence[Move]


class Core:
    """All methods are synchronous and must be called from one thread.

    Events are appended to ``outbox``, a list of :class:`~aioengine.events.Event`, which the caller empties.
    ``timer`` and ``processor`` measure the policy's decisions; the core itself has no clock. ``costs`` tells
    policies how long steps and moves take, where that is known beforehand; otherwise times are measured.
    ``repeats``: whether the device may take several steps of a batch at once. Each
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
        repeats: bool = False,
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
        self._repeats = repeats
        self._costs = MeasuredCosts(self.residency.by_policy_name, limits, self.batcher.pacer)
        self._results = StepResults(
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
        self.contents = StepContents(0, 0, 0, 0, ())
        """Contents of the last batch."""
        self._formed_at = -1
        """Value of ``_changes`` when the last batch had been formed."""
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
        if not params.ignore_eos:
            request.stops = request.stops.union(self.limits.eos_token_ids)
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
            if request in self._in_flight:
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

    def schedule(self, now: float) -> Step:
        """Decide the next step. Nothing may be in flight."""
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
        batch = self._form_batch(decision.admit)
        self.guard.carried_out(decision, self._changes)
        if batch is not None and self._repeats and (until := self._quiet_until()) > now:
            batch = batch._replace(steps=self.batcher.certain_steps(), until=until)
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
        ranks, formed = self.slots.ranks(), None
        if not admit and self._changes == self._formed_at:
            formed = self.batcher.form_again(self.now, ranks)
        again = formed is not None
        if formed is None:
            if self.placing.any_closed:
                admit = [request for request in admit if not self.placing.is_closed(request)]
            formed = self.batcher.form(admit, self.now, ranks)
        self._formed_at = self._changes
        if not formed.sequences:
            return None
        self.step += 1
        self._in_flight = formed.requests
        batch = StepBatch(self.step, formed.sequences, ranks, again)
        if not again:
            self.contents = batch.contents()
        self._note_used(self.now)
        return batch

    def _note_used(self, now: float) -> None:
        """Note that a step begins, and uses its slots."""
        slots = self.slots.slots
        for index in self.contents.slots:
            if (entry := slots[index].entry) is not None:
                slots[index].last_used = entry.last_used = now

    def _quiet_until(self) -> float:
        """Return the time until which neither the policy nor the core has anything to decide, unless
        something happens."""
        if self.placing.pinned_wait or self.residency.any_wanted or self._costs.learner is not None:
            return -inf
        due, until = self.next_due(), self.guard.quiet_until(self._changes)
        return until if due is None else min(due, until)

    def step_finished(
        self, batch: StepBatch, result: StepResult, now: float, *, intervals: bool = True
    ) -> list[tuple[events.TokenInterval, ...]]:
        """Pass a step's tokens on to the requests' sinks, and end the requests that are done. Also for
        several steps that a device took at once.

        Returns for each step the times between its tokens and the ones before, if ``intervals`` are wanted.
        """
        self.learn(batch, result.seconds[0])
        requests, self._in_flight = self._in_flight, []
        ended, self._zombies = self._zombies, []
        for request in ended:
            self.batcher.release(request)
        ends = result.ends or (now,)
        if len(ends) > 1:
            self.now = ends[-2]
            self.step += len(ends) - 1
            self._note_used(self.now)
        before: TokensBefore | None = [] if intervals else None
        self._results.take(requests, batch, result, ends, before)
        return [()] * len(ends) if before is None else token_intervals(before, ends)

    def learn(self, batch: StepBatch, seconds: float) -> None:
        """Learn from a step's time; ``step_finished`` does it too."""
        learner = self._costs.learner
        if learner is not None:
            learner.learn(self.batcher.work_of(batch), seconds)

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
        self.blocks.check([r.held for r in holders])
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


def _pacer(limits: CoreLimits) -> Pacer | None:
    if limits.max_step_seconds is None:
        return None
    return Pacer(limits.max_step_seconds, limits.pair_tokens)
