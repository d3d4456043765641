"""The engine's metrics: what its events add up to, and a snapshot of it at each scrape.

Names and units follow the Prometheus conventions: seconds, bytes, ratios, ``_total`` on counters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram

from aioengine import events
from aioengine.info import AdapterInfo, EngineStats
from aioengine.metrics.labels import AdapterLabels
from aioengine.metrics.residency import ResidencyTracker
from aioengine.metrics.snapshot import SnapshotCollector

_REQUEST_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_SCHEDULE_SECONDS = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.25)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class _Family:
    """The metrics that are kept for each adapter label, with the children looked up once."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def histogram(name: str, text: str) -> Histogram:
            return Histogram(name, text, ["adapter"], registry=registry, buckets=_REQUEST_SECONDS)

        self.queue = histogram(
            "aioengine_request_queue_seconds", "From arrival to first admission to the batch."
        )
        self.ttft = histogram("aioengine_request_ttft_seconds", "From arrival to the first token.")
        self.e2e = histogram("aioengine_request_e2e_seconds", "From arrival to the end.")
        self.prompt = Counter(
            "aioengine_prompt_tokens",
            "Prompt tokens of the requests that have ended.",
            ["adapter"],
            registry=registry,
        )
        self.generation = Counter(
            "aioengine_generation_tokens",
            "Tokens generated for the requests that have ended.",
            ["adapter"],
            registry=registry,
        )
        self.finished = Counter(
            "aioengine_requests_finished",
            "Requests that have ended; reason is stop, length, abort or error.",
            ["adapter", "reason"],
            registry=registry,
        )
        self._series: dict[str, _Series] = {}

    def series(self, label: str) -> _Series:
        found = self._series.get(label)
        if found is None:
            found = self._series[label] = _Series(self, label)
        return found


class _Series:
    """One adapter label's children."""

    def __init__(self, family: _Family, label: str) -> None:
        self.queue = family.queue.labels(label)
        self.ttft = family.ttft.labels(label)
        self.e2e = family.e2e.labels(label)
        self.prompt = family.prompt.labels(label)
        self.generation = family.generation.labels(label)
        self._finished = family.finished
        self._label = label

    def finished(self, reason: events.EndReason) -> None:
        self._finished.labels(self._label, reason).inc()


class EngineMetrics:
    """Collects one engine's metrics in ``registry``, a registry of its own.

    Args:
        max_adapter_labels: Adapters that get an ``adapter`` label of their own in the request
            metrics; those seen later are counted together under "other". The base model is "base".
        snapshot: Returns the engine's state now; called at each scrape.
        adapters: Returns the registered adapters; called at each scrape.

    ``handle`` and scrapes of ``registry`` belong on the event loop's thread.
    """

    def __init__(
        self,
        max_adapter_labels: int,
        snapshot: Callable[[], EngineStats],
        adapters: Callable[[], list[AdapterInfo]],
    ) -> None:
        self.registry = CollectorRegistry()
        self._labels = AdapterLabels(max_adapter_labels)
        self._residency = ResidencyTracker()
        self._requests = _Family(self.registry)
        self._define_lora()
        self._define_engine()
        self.registry.register(SnapshotCollector(snapshot, adapters, self._residency.ranks))
        self._handlers: dict[type[events.Event], Callable[[Any], None]] = {
            events.RequestAdded: self._request_added,
            events.RequestAdmitted: self._request_admitted,
            events.RequestPreempted: lambda event: self._preemptions.inc(),
            events.FirstToken: self._first_token,
            events.RequestEnded: self._request_ended,
            events.AdapterRegistered: self._adapter_registered,
            events.AdapterLoaded: self._adapter_loaded,
            events.AdapterPlaced: self._adapter_placed,
            events.AdapterEvicted: self._adapter_evicted,
            events.AdapterFailed: lambda event: self._load_failures.labels(event.reason).inc(),
            events.AdapterUnloaded: self._residency.unloaded,
            events.PolicyRefused: lambda event: self._refusals.labels(event.reason).inc(),
            events.PolicyFailed: lambda event: self._policy_errors.inc(),
            events.StepFinished: self._step_finished,
        }

    def handle(self, event: events.Event) -> None:
        """Take in one event; kinds that no metric is made of are passed over."""
        handler = self._handlers.get(type(event))
        if handler is not None:
            handler(event)

    # Definitions

    def _define_lora(self) -> None:
        self._swaps = self._counter(
            "aioengine_lora_swaps",
            "Adapters copied into a slot (load), taken out of one (evict), and superseded by a "
            "new version (replace).",
            "kind",
        )
        self._swap_seconds = Histogram(
            "aioengine_lora_swap_seconds",
            "Time to bring an adapter from disk to the CPU (disk), or from there to a slot (slot).",
            ["stage"],
            registry=self.registry,
            buckets=_STEP_SECONDS,
        )
        self._swap_bytes = self._counter(
            "aioengine_lora_swap_bytes", "Bytes of the adapters so moved.", "stage"
        )
        self._lookups = self._counter(
            "aioengine_lora_cache_requests",
            "Arriving requests: did a slot hold the adapter and, if none did, the CPU cache?",
            "level",
            "result",
        )
        self._load_failures = self._counter(
            "aioengine_lora_load_failures", "Adapters that could not be loaded.", "reason"
        )
        self._slot_busy = self._counter(
            "aioengine_lora_slot_busy_seconds", "Time in steps that used the slot.", "slot"
        )
        for kind in ("load", "evict", "replace"):
            self._swaps.labels(kind)
        for stage in ("disk", "slot"):
            self._swap_seconds.labels(stage)
            self._swap_bytes.labels(stage)

    def _define_engine(self) -> None:
        self._preemptions = self._counter(
            "aioengine_preemptions", "Requests taken off the batch, to be computed again later."
        )
        self._cached_tokens = self._counter(
            "aioengine_prompt_cached_tokens", "Prompt tokens that the prefix cache supplied."
        )
        self._step_seconds = Histogram(
            "aioengine_step_seconds",
            "Time of a model step; phase is prefill, decode or mixed.",
            ["phase"],
            registry=self.registry,
            buckets=_STEP_SECONDS,
        )
        self._step_tokens = self._counter(
            "aioengine_step_tokens", "Tokens computed in steps, by phase.", "phase"
        )
        self._schedule_seconds = Histogram(
            "aioengine_schedule_seconds",
            "Time that the policy and the core took to form a batch.",
            registry=self.registry,
            buckets=_SCHEDULE_SECONDS,
        )
        self._batch_sequences = Histogram(
            "aioengine_batch_sequences",
            "Requests in a step.",
            registry=self.registry,
            buckets=_COUNTS,
        )
        self._batch_adapters = Histogram(
            "aioengine_batch_adapters",
            "Distinct adapters in a step.",
            registry=self.registry,
            buckets=(0, *_COUNTS[:8]),
        )
        self._refusals = self._counter(
            "aioengine_policy_refusals",
            "Items of policy decisions that the core refused.",
            "reason",
        )
        self._policy_errors = self._counter(
            "aioengine_policy_errors", "Steps that the safe policy decided because this one failed."
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    # Requests

    def _request_added(self, event: events.RequestAdded) -> None:
        if event.adapter is not None:
            for lookup in self._residency.lookup(event.adapter):
                self._lookups.labels(lookup.level, "hit" if lookup.hit else "miss").inc()

    def _request_admitted(self, event: events.RequestAdmitted) -> None:
        if not event.resumed:
            series = self._requests.series(self._labels.of(event.adapter))
            series.queue.observe(event.queue_seconds)
            self._cached_tokens.inc(event.cached_tokens)

    def _first_token(self, event: events.FirstToken) -> None:
        self._requests.series(self._labels.of(event.adapter)).ttft.observe(event.seconds)

    def _request_ended(self, event: events.RequestEnded) -> None:
        series = self._requests.series(self._labels.of(event.adapter))
        series.e2e.observe(event.seconds)
        series.prompt.inc(event.prompt_tokens)
        series.generation.inc(event.output_tokens)
        series.finished(event.reason)

    # Adapters

    def _adapter_registered(self, event: events.AdapterRegistered) -> None:
        self._residency.registered(event)
        if event.replaces is not None:
            self._swaps.labels("replace").inc()

    def _adapter_loaded(self, event: events.AdapterLoaded) -> None:
        self._residency.loaded(event)
        self._swap_seconds.labels("disk").observe(event.seconds)
        self._swap_bytes.labels("disk").inc(event.nbytes)

    def _adapter_placed(self, event: events.AdapterPlaced) -> None:
        self._residency.placed(event)
        self._swaps.labels("load").inc()
        self._swap_seconds.labels("slot").observe(event.seconds)
        self._swap_bytes.labels("slot").inc(event.nbytes)

    def _adapter_evicted(self, event: events.AdapterEvicted) -> None:
        self._residency.evicted(event)
        if event.level == "slot":
            self._swaps.labels("evict").inc()

    # Steps

    def _step_finished(self, event: events.StepFinished) -> None:
        if event.prefill_tokens and event.decode_tokens:
            phase = "mixed"
        else:
            phase = "prefill" if event.prefill_tokens else "decode"
        self._step_seconds.labels(phase).observe(event.seconds)
        self._step_tokens.labels("prefill").inc(event.prefill_tokens)
        self._step_tokens.labels("decode").inc(event.decode_tokens)
        self._schedule_seconds.observe(event.schedule_seconds)
        self._batch_sequences.observe(event.sequences)
        self._batch_adapters.observe(event.adapters)
        for slot in event.slots:
            self._slot_busy.labels(str(slot)).inc(event.seconds)
