"""Listens to an engine and asserts, after every event, all that must hold then."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, NamedTuple

from simulation.faults import FaultyDevice, Memory, token_at

from aioengine import events
from aioengine.core import DropMove
from aioengine.engine import AsyncEngine
from aioengine.errors import (
    AdapterError,
    AdapterInvalid,
    AdapterNotFound,
    AioEngineError,
    DeadlineExceeded,
    EngineDead,
    EngineOverloaded,
    EngineStopped,
    RequestInvalid,
    RequestRejected,
)
from aioengine.runtime.output import RequestOutput
from aioengine.schedulers import Location, SlotState


class Accepted(NamedTuple):
    """A request that has not ended."""

    uid: int | None
    """Of the version of its adapter."""
    due: float | None


class Call:
    """One request as its caller sees it. ``outcome`` is its last output, or what it raised."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.outcome: RequestOutput | BaseException | None = None
        self.left = False
        """The caller went away: it was cancelled, or closed the iterator."""


class Checker:
    def __init__(self, engine: AsyncEngine, problem: Callable[[str], None]) -> None:
        self.log: list[events.Event] = []
        self.open: dict[str, Accepted] = {}
        self.ended: dict[str, events.RequestEnded] = {}
        self.stopped = False
        """``stop`` was called."""
        self.forced_pins = False
        """All slots may be pinned, or all of the memory that they share."""
        self._engine = engine
        self._problem = problem
        self._current: dict[str, int] = {}
        """The registered versions, by name, as the events tell."""
        self._failures: list[Exception] = []
        """What loads and copies failed with."""

    @property
    def memory(self) -> Memory:
        return self._device.memory

    @property
    def _device(self) -> FaultyDevice:
        device = self._engine._device  # type: ignore[attr-defined]
        assert isinstance(device, FaultyDevice)
        return device

    def __call__(self, event: events.Event) -> None:
        self.log.append(event)
        try:
            self._engine.check_invariants()
            self._check_memory()
            self._follow(event)
        except Exception as error:
            self._problem(f"after {type(event).__name__}: {type(error).__name__}: {error}")

    # The core against the device

    def _check_memory(self) -> None:
        core, memory = self._engine._core, self.memory
        if memory.lost:
            return  # the core will hear of it
        for slot in core.slots.slots:
            if slot.entry is not None and slot.state is not SlotState.LOADING:
                assert memory.slots[slot.index] == slot.entry.uid, f"slot {slot.index} holds something else"
        dropping = {move.entry.uid for move in core.residency._moves if isinstance(move, DropMove)}
        cached = {uid for uid, e in core.cpu.entries.items() if e.location is not Location.LOADING}
        assert not cached & dropping, "it is dropped, and still in use"
        assert memory.cpu.keys() == cached | dropping, (
            f"the CPU holds {sorted(memory.cpu)}; it should be {sorted(cached)} and, on its way out, "
            f"{sorted(dropping)}"
        )

    # Requests

    def _follow(self, event: events.Event) -> None:
        match event:
            case events.AdapterRegistered():
                self._current[event.adapter] = event.version
            case events.AdapterFailed():
                self._failures.append(event.error)
            case events.RequestAdded(request_id=request_id):
                assert request_id not in self.open, f"{request_id} was accepted twice"
                request = self._engine._core.requests[request_id]
                entry = request.adapter
                if entry is not None:
                    assert (entry.label, entry.version) == (event.adapter, self._current[entry.label])
                self.open[request_id] = Accepted(None if entry is None else entry.uid, request.deadline)
            case events.RequestAdmitted(request_id=request_id):
                due = self.open[request_id].due
                assert due is None or event.time < due, f"{request_id} begins after its deadline"
            case events.FirstToken(request_id=request_id):
                assert request_id in self.open, f"{request_id} goes on after its end"
            case events.RequestEnded(request_id=request_id):
                assert request_id in self.open, f"{request_id} ended twice, or never was accepted"
                self._check_error(event, self.open.pop(request_id))
                self.ended[request_id] = event

    def version_of(self, request_id: str) -> int | None:
        return self.open[request_id].uid if request_id in self.open else None

    def _check_error(self, event: events.RequestEnded, was: Accepted) -> None:
        """A request fails for a reason of its own, or because the engine ends."""
        error = event.error
        assert (error is not None) == (event.reason == "error")
        fault = self._device.failed_rows.get(event.request_id)
        assert fault is None or event.reason in ("error", "abort"), "it has no token, and goes on"
        match error:
            case None:
                return
            case EngineStopped():
                fine = self.stopped
            case EngineDead():
                fine = self._device.killed or self.memory.losses > 0
            case DeadlineExceeded():
                fine = was.due is not None and event.time >= was.due
            case RequestRejected():  # the policy's decision, which may be about any that has not run
                fine = event.output_tokens == 0
            case EngineOverloaded() if error.bound == "tenant":  # another tenant's took its place
                fine = event.output_tokens == 0
            case EngineOverloaded():
                fine = was.uid is not None and self.forced_pins
            case RequestInvalid():
                fine = fault == "request"
            case AdapterInvalid() if fault == "model":
                fine = was.uid is not None
            case AdapterError():
                told = repr(error) in map(repr, self._failures)  # it is a copy, without tracebacks
                fine = was.uid is not None and told and error.name == event.adapter
            case _:
                fine = isinstance(error, AioEngineError) and fault == "model" and was.uid is None
        assert fine, f"{event.request_id} fails with {error!r}, of which nothing tells"

    # Callers

    def check_call(self, call: Call, end_token: int) -> None:
        """What its caller got is what became of it."""
        outcome, end = call.outcome, self.ended.get(call.request_id)
        who = call.request_id
        if end is None:
            assert who not in self.open, f"{who}: its caller is gone, and it has not ended"
            refused = isinstance(
                outcome, (AdapterNotFound, AdapterError, EngineOverloaded, EngineStopped, EngineDead)
            )
            assert call.left or refused, f"{who} was never accepted, and its caller got {outcome!r}"
        elif call.left:
            return
        elif isinstance(outcome, RequestOutput):
            assert outcome.finish_reason == end.reason, f"{who}: {outcome.finish_reason} is {end.reason}"
            tokens = list(outcome.token_ids)
            assert len(tokens) == end.output_tokens, f"{who} got {len(tokens)} of {end.output_tokens} tokens"
            expected = [token_at(who, index) for index in range(len(tokens))]
            if end.reason == "stop":
                expected[-1] = end_token
            assert tokens == expected, f"{who} got other tokens than it should"
        else:
            assert outcome is end.error, f"{who} ended with {end.error!r}, and its caller got {outcome!r}"

    def check_rest(self, calls: int) -> None:
        """Nothing is left of requests that have all ended."""
        engine: Any = self._engine
        core = engine._core
        engine.check_invariants()
        assert not self.open and not core.requests, f"not ended: {sorted(self.open)}"
        assert not core.running and not core.queues
        assert core.blocks.num_free == core.blocks.num_blocks, "KV blocks are left"
        assert all(not e.running and not e.waiting for e in core.residency.entries.values())
        stats = engine.stats()
        told = stats.requests_finished + stats.requests_aborted + stats.requests_failed
        assert told == len(self.ended) <= calls, (
            f"{told} requests ended by the counters, {len(self.ended)} did"
        )

    def check_empty(self) -> None:
        """Nothing is left of adapters that have all been unloaded."""
        engine: Any = self._engine
        core, stepper = engine._core, engine._loop
        assert not core.residency.entries, "versions of adapters are left"
        assert not core.cpu.entries and not core.cpu.used.nbytes and not self.memory.cpu, (
            "the CPU cache is not empty"
        )
        assert all(slot.entry is None for slot in core.slots.slots), "slots are taken"
        assert not len(stepper._changed) and not stepper._moves._moves.tasks
        for name in core.residency.names.by_label.values():
            assert not (name.stop_load or name.unloads or name.claims)

    def check_tasks(self) -> None:
        names = {task.get_name() for task in asyncio.all_tasks()} - {"main", "scenario"}
        assert not names, f"tasks are left: {sorted(names)}"
