"""The engine's metrics: sums over its events, and a snapshot of its state at each scrape."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from aioengine import events
from aioengine.info import AdapterInfo, EngineStats
from aioengine.metrics.collect.by_adapter import AdapterMetrics
from aioengine.metrics.collect.by_tenant import HttpMetrics, TenantMetrics
from aioengine.metrics.collect.compat import vllm_gauges, vllm_load_seconds
from aioengine.metrics.collect.grammars import GrammarMetrics
from aioengine.metrics.collect.on_loop import OnLoop
from aioengine.metrics.collect.process import ProcessMetrics
from aioengine.metrics.collect.residency import ResidencyTracker
from aioengine.metrics.collect.snapshot import engine_state, gauge, gauges
from aioengine.metrics.collect.waits import AdapterWaits
from aioengine.metrics.families import definitions as d
from aioengine.metrics.families.exposition import OPENMETRICS, TEXT, TextWriter, to_metric
from aioengine.metrics.families.storage import Counters, Family, Histograms

_STEPS_TOGETHER = 64
"""Finished steps that wait to be counted at most, if nothing else happens and nobody reads."""


class EngineMetrics(Collector):
    """Collects one engine's metrics; ``registry`` is a separate registry that has them all.

    ``handle`` belongs on the event loop's thread. Scrapes of ``registry``, ``collect``, ``families``
    and ``expose`` may come from any: they take a snapshot on the loop's thread and render it on theirs.

    ``handle`` only keeps the event. The event is counted when the loop is free the next time, while the next
    model step already runs, or by a scrape that comes first. So a step does not wait for its metrics, and no
    scrape misses an event.

    Args:
        max_adapter_labels: Maximum number of adapters with a separate ``adapter`` label in the request
            metrics; see :class:`~aioengine.metrics.families.labels.AdapterLabels`.
        snapshot: Returns the engine's state now.
        adapters: Returns the registered adapters.
        engine: Value of the label ``engine`` of every series.
        compat: "vllm" adds the series that request routers read.
        model_name: Returns the base model's name in requests, which routers read.
        max_tenant_labels: Maximum number of tenants with a separate ``tenant`` label.
        state: Returns the engine's state; None: it is not exported.
        build: The labels of ``aioengine_build_info``; None: it is not exported.
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
        max_tenant_labels: int = 100,
        state: Callable[[], str] | None = None,
        build: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.engine = engine
        self._snapshot = snapshot
        self._adapters = adapters
        self._compat = compat
        self._model_name = model_name
        self._clock = clock
        self._on_loop = OnLoop()
        self._pending: deque[events.Event] = deque()
        self._applying = False
        """Whether ``_apply`` is to run soon."""
        self._writer = TextWriter()
        self._residency = ResidencyTracker()
        self._waits = AdapterWaits(self._residency)
        self._requests = AdapterMetrics(max_adapter_labels, clock)
        self._tenants = TenantMetrics(max_tenant_labels)
        self.http = HttpMetrics(self._tenants)
        """Metrics of the server that serves this engine."""
        self.grammars = GrammarMetrics()
        """Metrics of the compiler of this engine's grammars."""
        self._state = state
        self._build = build
        self._process: ProcessMetrics | None = None
        self._define_lora()
        self._define_engine()
        self._handlers: dict[type[events.Event], Callable[[Any], None]] = {
            events.RequestAdded: self._request_added,
            events.RequestRefused: lambda e: self._refused.inc((e.bound,)),
            events.RequestAdmitted: self._request_admitted,
            events.RequestPreempted: self._request_preempted,
            events.FirstToken: self._requests.first_token,
            events.TokensProposed: self._requests.proposed,
            events.RequestEnded: self._request_ended,
            events.AdapterRegistered: self._adapter_registered,
            events.AdapterLoading: lambda e: self._prefetched(self._residency.loading(e)),
            events.AdapterLoaded: self._adapter_loaded,
            events.AdapterPlacing: self._adapter_placing,
            events.AdapterPlaced: self._adapter_placed,
            events.AdapterEvicted: self._adapter_evicted,
            events.AdapterFailed: self._adapter_failed,
            events.ResolverFailed: lambda e: self._resolver_failures.inc((e.reason,)),
            events.AdapterUnloaded: self._adapter_unloaded,
            events.PolicyRefused: lambda e: self._refusals.inc((e.reason,)),
            events.PolicyFailed: lambda e: self._policy_errors.inc(),
            events.PolicyOverran: lambda e: self._overruns.inc(),
            events.PolicyReplaced: lambda e: self._replacements.inc(),
            events.StepFinished: self._step_finished,
            events.EngineRestarted: lambda e: self._restarts.inc(),
            events.LoopLag: lambda e: self._lag.at().observe(e.seconds),
        }
        self.dropped_log_lines: Callable[[], int] = int
        """Function that counts dropped log lines; called at each scrape. A program whose log may drop lines
        sets it."""
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def export_process(self) -> None:
        """Export the process's own metrics from now on. Only a program that is the whole process calls it,
        once; in an application, the application decides."""
        self._process = ProcessMetrics()

    def handle(self, event: events.Event) -> None:
        """Count one event; kinds that no metric needs are ignored."""
        self._pending.append(event)
        if type(event) is events.StepFinished and len(self._pending) < _STEPS_TOGETHER:
            return  # the next step waits for this one; whoever reads metrics applies what there is
        if not self._applying:
            self._applying = self._on_loop.soon(self._apply)
            if not self._applying:
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
        vllm = d.VLLM if self._compat == "vllm" else ()
        process = () if self._process is None else d.PROCESS
        return (to_metric(Family(definition, [])) for definition in (*d.OWN, *vllm, *process))

    def expose(self, accept: str = "") -> tuple[bytes, str]:
        """Return the exposition and its content type: OpenMetrics, which has the exemplars, if the ``Accept``
        header asks for it. The text is the same as ``prometheus_client`` writes for ``registry``, but is made
        faster."""
        openmetrics = "application/openmetrics-text" in accept
        text = self._writer.write(self.families(), openmetrics=openmetrics)
        return text, OPENMETRICS if openmetrics else TEXT

    def _families(self) -> list[Family]:
        self._apply()
        self._log_dropped.values[()] = self.dropped_log_lines()
        stats, adapters = self._snapshot(), self._adapters()
        self._pins_lost.values[()] = stats.kv_pins_lost
        self._listener_failures.values[()] = stats.listener_failures
        found = [*gauges(self.engine, stats, adapters, self._residency.rank)]
        by_name = (*self._requests.metrics, *self._tenants.metrics)
        found += [metric.family(self.engine) for metric in (*self._metrics, *by_name)]
        found += [*self.http.families(self.engine), *self.grammars.families(self.engine), *self._identity()]
        if self._process is not None:
            found += self._process.families(self.engine)
        if self._compat == "vllm":
            model = self._model_name()
            found += vllm_gauges(self.engine, model, stats, adapters, self._clock())
            found.append(vllm_load_seconds(self.engine, model, self._swap_seconds))
        return found

    def _identity(self) -> Iterator[Family]:
        yield engine_state(self.engine, self._state()) if self._state else gauge(self.engine, d.ENGINE_STATE)
        build = [] if self._build is None else [tuple(self._build[label] for label in d.BUILD_INFO.labels)]
        yield gauge(self.engine, d.BUILD_INFO, *((labels, 1.0) for labels in build))

    # Definitions

    def _define_lora(self) -> None:
        self._swaps = Counters(d.LORA_SWAPS, ("load",), ("evict",), ("replace",), ("move",))
        self._swap_seconds = Histograms(d.LORA_SWAP_SECONDS, ("disk",), ("cpu",), ("slot",))
        self._swap_bytes = Counters(d.LORA_SWAP_BYTES, ("disk",), ("slot",))
        pairs = [(level, result) for level in ("slot", "cpu") for result in ("hit", "miss")]
        self._lookups = Counters(d.LORA_CACHE_REQUESTS, *pairs)
        self._prefetches = Counters(d.LORA_PREFETCH, ("used",), ("wasted",), ("late",))
        reasons = ("invalid", "too_large", "io", "internal")
        self._load_failures = Counters(d.LORA_LOAD_FAILURES, *((reason,) for reason in reasons))
        self._resolver_failures = Counters(d.LORA_RESOLVER_FAILURES, ("invalid",), ("io",), ("internal",))
        self._slot_busy = Counters(d.LORA_SLOT_BUSY)

    def _define_engine(self) -> None:
        self._refused = Counters(d.REFUSED, ("server",), ("tenant",), ("adapter",))
        self._preemptions = Counters(d.PREEMPTIONS)
        self._cached_tokens = Counters(d.PROMPT_CACHED_TOKENS)
        self._pins_lost = Counters(d.KV_PINS_LOST)
        self._listener_failures = Counters(d.LISTENER_FAILURES)
        self._steps = Histograms(d.STEP, ("prefill",), ("decode",), ("mixed",))
        self._step_tokens = Counters(d.STEP_TOKENS, ("prefill",), ("decode",))
        self._schedule = Histograms(d.SCHEDULE)
        self._batch_sequences = Histograms(d.BATCH_SEQUENCES)
        self._batch_adapters = Histograms(d.BATCH_ADAPTERS)
        self._decisions = Histograms(d.POLICY_DECISION)
        self._refusals = Counters(d.POLICY_REFUSALS)
        self._policy_errors = Counters(d.POLICY_ERRORS)
        self._overruns = Counters(d.POLICY_OVERRUNS)
        self._replacements = Counters(d.POLICY_REPLACEMENTS)
        self._restarts = Counters(d.EXECUTOR_RESTARTS)
        self._log_dropped = Counters(d.LOG_DROPPED)
        self._lag = Histograms(d.EVENT_LOOP_LAG)

    @property
    def _metrics(self) -> list[Counters | Histograms]:
        return [metric for metric in vars(self).values() if isinstance(metric, (Counters, Histograms))]

    # Requests

    def _request_added(self, event: events.RequestAdded) -> None:
        if event.adapter is not None:
            for lookup in self._residency.lookup(event.adapter, event.time):
                self._lookups.inc((lookup.level, "hit" if lookup.hit else "miss"))
            self._requests.labels.used(event.adapter)
            self._waits.added(event)

    def _request_admitted(self, event: events.RequestAdmitted) -> None:
        wait = self._waits.admitted(event)
        if not event.resumed:
            self._requests.admitted(event, wait)
            self._cached_tokens.inc(amount=event.cached_tokens)

    def _request_preempted(self, event: events.RequestPreempted) -> None:
        self._waits.preempted(event)
        self._preemptions.inc()

    def _request_ended(self, event: events.RequestEnded) -> None:
        self._waits.ended(event)
        self._requests.ended(event)
        self._tenants.ended(event)

    # Adapters

    def _prefetched(self, result: str | None) -> None:
        if result is not None:
            self._prefetches.inc((result,))

    def _adapter_registered(self, event: events.AdapterRegistered) -> None:
        self._residency.registered(event)
        if event.replaces is not None:
            self._swaps.inc(("replace",))

    def _adapter_loaded(self, event: events.AdapterLoaded) -> None:
        self._residency.loaded(event)
        self._swap_seconds.at(("disk",)).observe(event.seconds)
        self._swap_bytes.inc(("disk",), event.nbytes)

    def _adapter_placing(self, event: events.AdapterPlacing) -> None:
        seconds = self._residency.placing(event)
        if seconds is not None:
            self._swap_seconds.at(("cpu",)).observe(seconds)

    def _adapter_placed(self, event: events.AdapterPlaced) -> None:
        self._prefetched(self._residency.placed(event))
        self._swaps.inc(("move" if event.moved else "load",))
        self._swap_seconds.at(("slot",)).observe(event.seconds)
        self._swap_bytes.inc(("slot",), event.nbytes)

    def _adapter_evicted(self, event: events.AdapterEvicted) -> None:
        self._prefetched(self._residency.evicted(event))
        if event.level == "slot":
            self._swaps.inc(("evict",))

    def _adapter_failed(self, event: events.AdapterFailed) -> None:
        self._residency.failed(event)
        self._load_failures.inc((event.reason,))

    def _adapter_unloaded(self, event: events.AdapterUnloaded) -> None:
        if self._residency.unloaded(event):
            self._requests.labels.unloaded(event.adapter)

    # Steps

    def _step_finished(self, event: events.StepFinished) -> None:
        if event.prefill_tokens and event.decode_tokens:
            phase = "mixed"
        else:
            phase = "prefill" if event.prefill_tokens else "decode"
        self._steps.at((phase,)).observe(event.seconds)
        self._step_tokens.inc(("prefill",), event.prefill_tokens)
        self._step_tokens.inc(("decode",), event.decode_tokens)
        self._schedule.at().observe(event.schedule_seconds)
        self._decisions.at().observe(event.policy_seconds)
        self._batch_sequences.at().observe(event.sequences)
        self._batch_adapters.at().observe(event.adapters)
        for slot in event.slots:
            self._slot_busy.inc((str(slot),), event.seconds)
        for interval in event.intervals:
            self._requests.interval(interval)
