"""The engine's metrics: sums over its events, and a snapshot of its state at each scrape."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from aioengine import events
from aioengine.info import AdapterInfo, EngineInfo, EngineStats
from aioengine.metrics.collect.compat import vllm_families
from aioengine.metrics.collect.http import HttpMetrics
from aioengine.metrics.collect.on_loop import OnLoop
from aioengine.metrics.collect.residency import AdapterTracker
from aioengine.metrics.collect.snapshot import ProcessMetrics, engine_gauges, engine_state
from aioengine.metrics.families.definitions import OWN, PROCESS, VLLM
from aioengine.metrics.families.exposition import TextWriter, to_metric
from aioengine.metrics.families.storage import BoundedLabels, Family, Store, gauge

_STEPS_TOGETHER = 64
"""Finished steps that wait to be counted at most, if nothing else happens and nobody reads."""

_COUNTED: dict[type[events.Event], tuple[str, ...]] = {
    events.RequestRefused: ("requests_refused", "bound"),
    events.ResolverFailed: ("lora_resolver_failures", "reason"),
    events.PolicyRefused: ("policy_refusals", "reason"),
    events.PolicyFailed: ("policy_errors",),
    events.PolicyOverran: ("policy_overruns",),
    events.PolicyReplaced: ("policy_replacements",),
    events.EngineRestarted: ("executor_restarts",),
}
"""Events that only add 1 to a counter, with those of their fields that are its labels."""


class EngineMetrics(Collector):
    """Collects one engine's metrics; ``registry`` is a separate registry that has them all.

    ``handle`` belongs on the event loop's thread. Scrapes of ``registry``, ``collect``, ``families``
    and ``expose`` may come from any: they take a snapshot on the loop's thread and render it on theirs.

    ``handle`` only keeps the event. The event is counted when the loop is free the next time, while the next
    model step already runs, or by a scrape that comes first. So a step does not wait for its metrics, and no
    scrape misses an event.

    Args:
        max_adapter_labels: Maximum number of adapters with a separate ``adapter`` label in the request
            metrics; see :class:`~aioengine.metrics.families.storage.BoundedLabels`.
        snapshot: Returns the engine's state now.
        adapters: Returns the registered adapters.
        engine: Value of the label ``engine`` of every series.
        compat: "vllm" adds the series that request routers read.
        model_name: Returns the base model's name in requests, which routers read.
        state: Returns the engine's state; None: it is not exported.
        build: What ``aioengine_build_info`` says; None: it is not exported.
        clock: Unix time, for exemplars and for metrics whose value is the time.
    """

    def __init__(
        self,
        max_adapter_labels: int,
        snapshot: Callable[[], EngineStats],
        adapters: Callable[[], list[AdapterInfo]],
        *,
        engine: str = "default",
        compat: Literal["none", "vllm"] = "none",
        model_name: Callable[[], str] = lambda: "",
        state: Callable[[], str] | None = None,
        build: EngineInfo | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.engine = engine
        self._snapshot = snapshot
        self._adapters = adapters
        self._compat = compat
        self._model_name = model_name
        self._state = state
        labels = OWN["build_info"].labels
        self._build = [tuple(str(getattr(build, label)).lower() for label in labels)] if build else []
        self._clock = clock
        self._on_loop = OnLoop()
        self._pending: deque[events.Event] = deque()
        self._applying = False
        """Whether ``_apply`` is to run soon."""
        self._writer = TextWriter()
        self._store = Store({n: d for n, d in OWN.items() if not n.startswith(("http_", "tenant_"))})
        self._tracker = AdapterTracker(self._store)
        fold = partial(self._store.fold, "adapter")
        self._labels = BoundedLabels(max_adapter_labels, fold, nobody="base", kind="adapter")
        self.http = HttpMetrics(max_adapter_labels)
        """Metrics of the server that serves this engine."""
        self.grammars_kept: list[Callable[[], int]] = []
        """Functions that count compiled grammars, called at each scrape."""
        self.dropped_log_lines: Callable[[], int] = int
        """Function that counts dropped log lines; called at each scrape. A program whose log may drop lines
        sets it."""
        self._process: ProcessMetrics | None = None
        tracker = self._tracker
        self._handlers: dict[type[events.Event], Callable[[Any], None]] = {
            **{kind: self._counter(*counted) for kind, counted in _COUNTED.items()},
            events.RequestAdded: self._request_added,
            events.RequestAdmitted: self._request_admitted,
            events.RequestPreempted: self._request_preempted,
            events.FirstToken: self._first_token,
            events.TokensProposed: self._proposed,
            events.RequestEnded: self._request_ended,
            events.AdapterRegistered: tracker.registered,
            events.AdapterLoading: tracker.loading,
            events.AdapterLoaded: tracker.loaded,
            events.AdapterPlacing: tracker.placing,
            events.AdapterPlaced: tracker.placed,
            events.AdapterEvicted: tracker.evicted,
            events.AdapterFailed: tracker.failed,
            events.AdapterUnloaded: self._adapter_unloaded,
            events.StepFinished: self._step_finished,
            events.LoopLag: lambda e: self._store.observe("event_loop_lag_seconds", e.seconds),
        }
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def export_process(self) -> None:
        """Export the process's own metrics from now on. Only a program that is the whole process calls it,
        once; in an application, the application decides."""
        self._process = ProcessMetrics()

    def grammar_compiled(self, outcome: str, seconds: float) -> None:
        """Count a compile of a grammar, on the event loop's thread."""
        self._store.inc("grammar_compiles", (outcome,))
        self._store.observe("grammar_compile_seconds", seconds)

    def handle(self, event: events.Event) -> None:
        """Count one event; kinds that no metric needs are ignored."""
        self._pending.append(event)
        if type(event) is events.StepFinished and len(self._pending) < _STEPS_TOGETHER:
            return  # the next step waits for this one; whoever reads metrics applies what there is
        if not self._applying:
            try:
                asyncio.get_running_loop().call_soon(self._apply)
                self._applying = True
            except RuntimeError:  # there is no loop
                self._apply()

    def _apply(self) -> None:
        self._applying = False  # first, so that after an error in a handler the next event applies the rest
        pending, handlers = self._pending, self._handlers
        while pending:
            event = pending.popleft()
            handler = handlers.get(type(event))
            if handler is not None:
                handler(event)

    # Ways out

    def families(self) -> list[Family]:
        """Return all metric families with their current values."""
        return self._on_loop.call(self._families)

    def collect(self) -> Iterator[Metric]:
        """Return the families in the form that ``prometheus_client`` expects of a collector."""
        return map(to_metric, self.families())

    def describe(self) -> Iterator[Metric]:
        """Return the families without series, so that a registry knows their names in advance."""
        more = [VLLM] * (self._compat == "vllm") + [PROCESS] * (self._process is not None)
        known = [definition for table in (OWN, *more) for definition in table.values()]
        return (to_metric(Family(definition, [])) for definition in known)

    def expose(self, accept: str = "") -> tuple[bytes, str]:
        """Return the exposition and its content type: OpenMetrics, which has the exemplars, if the ``Accept``
        header asks for it. The text is the same as ``prometheus_client`` writes for ``registry``, but is made
        faster."""
        return self._writer.answer(self.families(), accept)

    def _families(self) -> list[Family]:
        self._apply()
        engine, stats, adapters = self.engine, self._snapshot(), self._adapters()
        self._store.count("log_dropped", self.dropped_log_lines())
        self._store.count("listener_failures", stats.listener_failures)
        values = engine_gauges(stats, adapters, self._tracker.rank)
        values["grammars_kept"] = sum(kept() for kept in self.grammars_kept)
        values["build_info"] = dict.fromkeys(self._build, 1.0)
        found = [gauge(engine, name, value) for name, value in values.items()]
        found.append(
            engine_state(engine, self._state()) if self._state else gauge(engine, "engine_state", {})
        )
        found += [*self._store.families(engine), *self.http.families(engine)]
        if self._process is not None:
            found += self._process.families(engine)
        if self._compat == "vllm":
            found += vllm_families(engine, self._model_name(), stats, adapters, self._clock(), self._store)
        return found

    # Events

    def _counter(self, name: str, *fields: str) -> Callable[[events.Event], None]:
        return lambda event: self._store.inc(name, tuple(getattr(event, field) for field in fields))

    def _request_added(self, event: events.RequestAdded) -> None:
        if event.adapter is not None:
            self._tracker.added(event.adapter, event)
            self._labels.used(event.adapter)

    def _request_admitted(self, event: events.RequestAdmitted) -> None:
        wait = None if event.adapter is None else self._tracker.admitted(event)
        if event.resumed:
            return
        label = self._labels.of(event.adapter)
        self._store.observe("request_queue_seconds", event.queue_seconds, (label,))
        self._store.inc("prompt_cached_tokens", amount=event.cached_tokens)
        if wait is not None:
            self._store.observe("request_adapter_wait_seconds", wait, (label,))

    def _request_preempted(self, event: events.RequestPreempted) -> None:
        self._tracker.preempted(event)
        self._store.inc("preemptions")

    def _first_token(self, event: events.FirstToken) -> None:
        label = self._labels.of(event.adapter)
        now = self._clock()
        self._store.observe_request("request_ttft_seconds", event.seconds, label, event.request_id, now)

    def _proposed(self, event: events.TokensProposed) -> None:
        label = self._labels.of(event.adapter)
        self._store.inc("speculation_proposed_tokens", (label,), event.proposed)
        self._store.inc("speculation_accepted_tokens", (label,), event.accepted)

    def _request_ended(self, event: events.RequestEnded) -> None:
        if event.adapter is not None:
            self._tracker.ended(event)
        if event.tenant is not None:
            self.http.ended(event.tenant, event)
        label = self._labels.of(event.adapter)
        now = self._clock()
        self._store.observe_request("request_e2e_seconds", event.seconds, label, event.request_id, now)
        self._store.inc("prompt_tokens", (label,), event.prompt_tokens)
        self._store.inc("generation_tokens", (label,), event.output_tokens)
        self._store.inc("requests_finished", (label, event.reason))

    def _adapter_unloaded(self, event: events.AdapterUnloaded) -> None:
        if self._tracker.unloaded(event):
            self._labels.gone(event.adapter)

    def _step_finished(self, event: events.StepFinished) -> None:
        store, count = self._store, event.steps
        phase = "prefill" if event.prefill_tokens else "decode"
        if event.prefill_tokens and event.decode_tokens:
            phase = "mixed"
        store.observe("step_seconds", event.seconds / count, (phase,), count)
        store.inc("step_tokens", ("prefill",), count * event.prefill_tokens)
        store.inc("step_tokens", ("decode",), count * event.decode_tokens)
        store.observe("schedule_seconds", event.schedule_seconds)
        store.observe("policy_decision_seconds", event.policy_seconds)
        store.observe("batch_sequences", event.sequences, (), count)
        store.observe("batch_adapters", event.adapters, (), count)
        for slot in event.slots:
            store.inc("lora_slot_busy_seconds", (str(slot),), event.seconds)
        for adapter, seconds, tokens in event.intervals:
            label = self._labels.of(adapter)
            store.observe("request_inter_token_seconds", seconds, (label,), tokens)
