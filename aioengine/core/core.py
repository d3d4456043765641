"""The engine's core: a deterministic state machine over requests, slots and KV blocks.

No I/O, no clock, no torch. Events go in (a request is added or aborted, an adapter is on the CPU or in its
slot, a load failed, a step finished), each with ``now``. ``schedule(now)`` answers with a batch to run and
adapter moves to start. The policy only proposes: the core checks every proposal and keeps every invariant.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import inf
from typing import NamedTuple

from sortedcontainers import SortedDict

from aioengine import events
from aioengine.core.adapters.moves import Move
from aioengine.core.adapters.placing import Placing
from aioengine.core.adapters.residency import Residency
from aioengine.core.batcher import Batcher
from aioengine.core.blocks import BlockManager
from aioengine.core.guard import PolicyGuard
from aioengine.core.limits import CoreLimits
from aioengine.core.pacing import MeasuredCosts, Pacer
from aioengine.core.queues import RequestQueues
from aioengine.core.state import AdapterEntry, Request, Status, where_is
from aioengine.core.step_results import StepResults, token_intervals
from aioengine.core.view import CoreView
from aioengine.core.waiting_room import Reservation, WaitingRoom
from aioengine.errors import AdapterError, DeadlineExceeded, EngineOverloaded, RequestRejected
from aioengine.request import RequestOptions, SamplingParams
from aioengine.schedulers.policies.fcfs import FCFS
from aioengine.schedulers.policy import CostsView, Location, SchedulerPolicy
from aioengine.step import LoadedAdapter, StepBatch, StepResult


class Step(NamedTuple):
    """Result of ``schedule``: a batch to run (None if nothing can run now), and moves to start."""

    batch: StepBatch | None
    moves: Sequence[Move]


class Core:
    """All methods are synchronous and must be called from one thread.

    Each batch that ``schedule`` returns must come back through ``step_finished`` before the next call of
    ``schedule``. Events are appended to ``outbox``, which the caller empties. ``timer`` and ``processor``
    measure the policy's decisions; the core itself has no clock. ``costs`` tells policies how long steps and
    moves take, where that is known beforehand; otherwise times are measured. ``repeats``: whether the device
    may take several steps of a batch at once.
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
        self.requests: dict[str, Request] = {}
        """Requests that are accepted and have not ended."""
        self.now = 0.0
        self.step = 0
        known: dict[str, AdapterEntry] = {}
        self.guard = PolicyGuard(policy, FCFS, limits, self.requests, known, timer, processor)
        self.outbox = self.guard.outbox
        """The events so far; always the same list."""
        self.residency = Residency(limits, known, self.guard, self._cpu_order)
        self.slots = self.residency.slots
        self.cpu = self.residency.cpu
        self.placing = Placing(self.residency, self.guard)
        self.blocks = BlockManager(
            limits.num_blocks,
            limits.block_size,
            prefix_caching=limits.prefix_caching,
        )
        self.room = WaitingRoom(limits)
        self.queues = RequestQueues(self.room)
        seconds = limits.max_step_seconds
        pacer = None if seconds is None else Pacer(seconds, limits.pair_tokens)
        self.batcher = Batcher(self.blocks, self.queues, self.guard, limits, pacer)
        self.running = self.batcher.running
        self._repeats = repeats
        self._costs = MeasuredCosts(known, limits, pacer)
        self._results = StepResults(self.batcher, self.guard, self.end)
        self._view = CoreView(
            self.residency, self.queues, self.batcher, costs or self._costs, self.guard.refusals
        )
        self._rng = random.Random(limits.seed)
        self._next_seq = 0
        self._arranged_at = -1
        """Value of ``guard.changes`` when pinned adapters were last placed."""
        self._deadlines: SortedDict[tuple[float, int], Request] = SortedDict()
        self._in_flight: list[Request] = []
        """The requests of the step in flight."""
        self._zombies: list[Request] = []
        """Requests that ended while in flight. Their blocks and slots are released when the step comes
        back."""

    # Events in: requests

    def reserve(
        self, tenant: str | None, adapter: str | None, now: float, tokens: int | None = None
    ) -> Reservation:
        """Reserve a waiting place for a later ``add_request``, for an adapter of this name. ``tokens`` is
        the length of its prompt; if that is not known yet, ``weigh`` follows. Another tenant's request may be
        displaced for it. Raises EngineOverloaded if there is none."""
        with self._telling_refusals(tenant, adapter, now):
            return self.room.enter(tenant, adapter, now, tokens)

    def weigh(self, reservation: Reservation, tokens: int, now: float) -> None:
        """Count the tokens of a prompt whose place was reserved. Raises EngineOverloaded if they are too
        many."""
        with self._telling_refusals(reservation.tenant, reservation.adapter, now):
            self.room.weigh(reservation, tokens, now)

    @contextmanager
    def _telling_refusals(self, tenant: str | None, adapter: str | None, now: float) -> Iterator[None]:
        """Tell listeners of a request that finds no waiting place."""
        try:
            yield
        except EngineOverloaded as error:
            bound = error.bound or "server"
            self.guard.emit(events.RequestRefused(time=now, adapter=adapter, tenant=tenant, bound=bound))
            raise

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
        reservation: Reservation | None = None,
        given: Sequence[int] = (),
    ) -> Request:
        """Accept a request (its prompt already checked against ``max_model_len``).

        ``adapter`` is the version for the adapter's name in ``options``, ``scale`` what it is multiplied by,
        and ``deadline`` the time when the request must have ended. ``given`` is unfinished output of another
        engine; the request continues it. ``reservation`` is its place among the waiting requests. Raises
        EngineOverloaded without one, as ``reserve`` does.
        """
        assert request_id not in self.requests
        if reservation is None:
            name = None if adapter is None else adapter.label
            reservation = self.reserve(options.tenant, name, now, len(prompt))
        stops = frozenset(params.stop_token_ids)
        request = Request(
            request_id,
            [*prompt, *given],
            len(prompt),
            params,
            options,
            adapter=adapter,
            scale=scale,
            seq=self._next_seq,
            arrival=now,
            seed=params.seed if params.seed is not None else self._rng.getrandbits(63),
            deadline=deadline,
            stops=stops if params.ignore_eos else stops.union(self.limits.eos_token_ids),
            most_tokens=min(len(prompt) + params.max_tokens, self.limits.max_model_len),
            cache=self.blocks,
            reservation=reservation,
        )
        reservation.displaced = lambda error, now: self.end(request, "error", now, error)
        self._next_seq += 1
        self.requests[request_id] = request
        self.queues.add(request)
        if deadline is not None:
            self._deadlines[deadline, request.seq] = request
        self.guard.note(
            events.RequestAdded,
            request,
            now,
            prompt_tokens=len(prompt),
            tenant=options.tenant,
            location=None if adapter is None else adapter.where,
            priority=options.priority,
            deadline=deadline,
        )
        return request

    def end(
        self, request: Request, reason: events.EndReason, now: float, error: Exception | None = None
    ) -> None:
        """End a request; its blocks and its claim on the slot are released now, or when the step in flight
        comes back."""
        if request.status is Status.ENDED:
            return
        if request.status is Status.WAITING:
            self.queues.remove(request)
        else:
            del self.running[request.seq]
            if request in self._in_flight:
                self._zombies.append(request)
            else:
                self.batcher.release(request)
        request.status, request.decodes = Status.ENDED, False
        if request.deadline is not None:
            del self._deadlines[request.deadline, request.seq]
        self.guard.note(
            events.RequestEnded,
            request,
            now,
            reason=reason,
            error=error,
            prompt_tokens=request.prompt_len,
            output_tokens=request.made_tokens,
            seconds=now - request.arrival,
            tenant=request.options.tenant,
            worst_gap=request.worst_gap,
        )
        del self.requests[request.id], request.view
        sink, request.sink = request.sink, None
        if sink is not None:
            sink.end(reason, error)

    # Events in: adapters

    def adapter_loaded(self, entry: AdapterEntry, now: float, found: LoadedAdapter) -> AdapterError | None:
        """Take in an adapter that has been read. Returns the reason if it can never be kept; the requests
        that wait for it fail with this reason. Otherwise it is in the cache, or dropped if there is no room
        for its bytes beside the adapters that others need; then it is read again when there is room."""
        self.now = max(self.now, now)
        error = self.residency.loaded(entry, now, found)
        if error is not None:
            self._fail_waiting(entry, now, error)
        elif not entry.scalable:
            failure = entry.changed("to a kind that is scaled in another way; try again")
            for request in [waiting for waiting in entry.waiting if waiting.scale != 1.0]:
                self.end(request, "error", now, failure)
        return error

    def adapter_load_failed(
        self, entry: AdapterEntry, now: float, error: Exception, reason: events.LoadFailure
    ) -> None:
        """Fail the requests that wait for this adapter with ``error``; no other request is affected."""
        self.residency.load_failed(entry, now, error, reason)
        self._fail_waiting(entry, now, error)

    def adapter_place_failed(self, entry: AdapterEntry, now: float, error: Exception) -> None:
        self.residency.place_failed(entry, now, error)
        self._fail_waiting(entry, now, error)

    def _fail_waiting(self, entry: AdapterEntry, now: float, error: Exception) -> None:
        for request in list(entry.waiting):
            self.end(request, "error", now, error)

    # Scheduling

    def schedule(self, now: float) -> Step:
        """Decide the next step. Nothing may be in flight."""
        assert not self._in_flight
        self.now = now
        self.expire(now)
        news = self.guard.changes != self._arranged_at
        if news and self.residency.names.pinned:
            self.residency.refuse_shut_out(now)
            for entry, error in self.placing.shut_out(self.queues.heads.values()):
                self._fail_waiting(entry, now, error)
        # After what ends requests: one may be the last of a retired adapter.
        self.residency.sweep(now)
        if news or self.placing.pinned_wait:
            self.placing.place_pinned(now)
            self._arranged_at = self.guard.changes
        self._view.advance(now, self.step)
        decision = self.guard.decide(self._view)
        for request, why in decision.reject:
            self._reject(request, why, now)
        for request in decision.preempt:
            if request.status is Status.RUNNING:
                self.batcher.preempt(request, now)
            else:
                self.guard.refuse("preempt_not_running", request.id)
        self.placing.apply(decision, now)
        preemptions = self.batcher.preemptions
        batch = self._form_batch(decision.admit)
        if self.batcher.preemptions == preemptions:
            self.guard.carried_out(decision)
        busy = self.placing.pinned_wait or self.residency.wanted or self._costs.learner is not None
        if batch is not None and self._repeats and not busy:
            due, until = self.next_due(), self.guard.quiet_until
            until = until if due is None else min(due, until)
            if until > now:  # neither the policy nor the core has anything to decide before
                batch = batch._replace(steps=self.batcher.certain_steps(), until=until)
        return Step(batch, self.residency.take_moves())

    def _form_batch(self, admit: Sequence[Request]) -> StepBatch | None:
        ranks, closed = self.slots.ranks(), self.placing.closed
        if closed:
            admit = [r for r in admit if r.adapter is None or r.adapter.uid not in closed]
        again = self.batcher.form(admit, self.now, ranks)
        if not self.batcher.formed:
            return None
        self.step += 1
        self._in_flight = self.batcher.formed
        batch = StepBatch(self.step, self.batcher.sequences, ranks, again)
        self._note_used(self.now)
        return batch

    def _note_used(self, now: float) -> None:
        """Note that a step begins, and uses its slots."""
        slots = self.slots.slots
        for index in self.batcher.contents.slots:
            if (entry := slots[index].entry) is not None:
                slots[index].last_used = entry.last_used = now

    def _reject(self, request: Request, reason: str, now: float) -> None:
        """End a request by the policy's decision, if it has never run."""
        if request.status is not Status.WAITING or request.admitted is not None:
            self.guard.refuse("reject_already_started", request.id)
            return
        text = f"request {request.id!r} was rejected: {reason or 'the scheduling policy gives no reason'}"
        self.end(request, "error", now, RequestRejected(f"{text}; try again later", reason=reason))

    def step_lost(self) -> None:
        """Note that nothing is in flight any more. Blocks and slots of the ended requests are released."""
        self._in_flight = []
        for request in self._zombies:
            self.batcher.release(request)
        self._zombies = []

    def device_lost(self, now: float, error: Exception) -> None:
        """Forget everything that was computed and loaded. Running requests fail with ``error``, waiting ones
        keep waiting, and adapters are on disk again. The caller must not report batches or moves that were
        under way."""
        self.now = max(self.now, now)
        self.guard.changes += 1
        self.step_lost()
        for request in list(self.running.values()):
            self.end(request, "error", now, error)
        self.blocks.forget()
        self.residency.device_lost(now)

    def next_due(self) -> float | None:
        """Return the time when ``schedule`` must be called even if nothing else happens."""
        deadline = self._deadlines.peekitem(0)[0][0] if self._deadlines else None
        times = deadline, self.placing.next_retry(self.now)
        return min((at for at in times if at is not None), default=None)

    def expire(self, now: float) -> None:
        """End the requests whose deadline has passed; ``schedule`` does it too."""
        while self._deadlines and (first := self._deadlines.peekitem(0))[0] <= (now, inf):
            (due, _), request = first
            late = f"request {request.id!r}{where_is(request.adapter)}: its deadline passed "
            late += f"{now - due:.3f} s ago with "
            late += f"{request.output_tokens} of {request.params.max_tokens} tokens generated"
            self.end(request, "error", now, DeadlineExceeded(late))

    # The batch

    def step_finished(
        self, batch: StepBatch, result: StepResult, now: float, *, intervals: bool = True
    ) -> list[tuple[events.TokenInterval, ...]]:
        """Pass the tokens of a step, or of several that a device took at once, on to the requests' sinks, and
        end the requests that are done. Returns for each step the times between its tokens and the ones
        before, if ``intervals`` are wanted."""
        self.learn(batch, result.seconds[0])
        requests, ends = self._in_flight, result.ends or (now,)
        self.step_lost()
        if len(ends) > 1:
            self.now = ends[-2]
            self.step += len(ends) - 1
            self._note_used(self.now)
        told = self._results.take(requests, batch, result, ends, tells=intervals)
        return token_intervals(told, ends) if intervals else [()] * len(ends)

    def learn(self, batch: StepBatch, seconds: float) -> None:
        """Learn from a step's time; ``step_finished`` does it too."""
        learner = self._costs.learner
        if learner is not None:
            learner.learn(self.batcher.work_of(batch), seconds)

    def _cpu_order(self, entries: Sequence[AdapterEntry]) -> Sequence[AdapterEntry]:
        """Return the policy's order of eviction from the CPU cache. Adapters that it does not name follow by
        last use. Versions that were never published come first, because the policy does not know them."""
        entries = sorted(entries, key=lambda entry: entry.last_used)
        unknown = [entry for entry in entries if not entry.published]
        rest = {entry.name: entry for entry in entries if entry.published}
        self._view.advance(self.now, self.step)
        named = self.guard.cpu_victims(self._view, list(rest)) if len(rest) > 1 else []
        first = [rest.pop(name) for name in dict.fromkeys(named) if name in rest]
        return [*unknown, *first, *rest.values()]

    def check(self) -> None:
        """Assert every invariant; for tests, and cheap enough to run whenever the engine is idle."""
        self.residency.check()
        holders = [*self.running.values(), *self._zombies]
        self.blocks.check([r.blocks for r in holders])
        using = Counter(request.adapter for request in holders)
        assert all(e is None or e.location is Location.SLOT for e in using)
        assert all(e.running == using[e] for e in self.residency.entries.values())
        assert len(self.requests) == len(self.running) + len(self.queues)
        assert len(self.running) <= self.limits.max_num_seqs
        assert len(self._deadlines) == sum(r.deadline is not None for r in self.requests.values())
        self.queues.check()
        for request in self.queues:
            assert request.status is Status.WAITING and not request.blocks
