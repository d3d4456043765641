"""The request metrics, by adapter."""

from __future__ import annotations

from collections.abc import Callable

from aioengine import events
from aioengine.metrics.families import definitions as d
from aioengine.metrics.families.labels import OTHER, AdapterLabels
from aioengine.metrics.families.storage import Counters, Histograms


class AdapterMetrics:
    """Request metrics by adapter. When an adapter loses its label, its values are added to "other", so sums
    over the label ``adapter`` never go down. ``clock`` is Unix time, for exemplars."""

    def __init__(self, max_labels: int, clock: Callable[[], float]) -> None:
        self.labels = AdapterLabels(max_labels, self._fold)
        self._clock = clock
        self._queue = Histograms(d.REQUEST_QUEUE)
        self._adapter_wait = Histograms(d.REQUEST_ADAPTER_WAIT)
        self._ttft = Histograms(d.REQUEST_TTFT)
        self._inter_token = Histograms(d.REQUEST_INTER_TOKEN)
        self._e2e = Histograms(d.REQUEST_E2E)
        self._finished = Counters(d.REQUESTS_FINISHED)
        self._prompt = Counters(d.PROMPT_TOKENS)
        self._generation = Counters(d.GENERATION_TOKENS)
        self._proposed = Counters(d.PROPOSED_TOKENS)
        self._accepted = Counters(d.ACCEPTED_TOKENS)
        self.metrics: tuple[Counters | Histograms, ...] = (
            self._queue,
            self._adapter_wait,
            self._ttft,
            self._inter_token,
            self._e2e,
            self._finished,
            self._prompt,
            self._generation,
            self._proposed,
            self._accepted,
        )

    def _fold(self, label: str) -> None:
        for metric in self.metrics:
            metric.fold(label, OTHER)

    def admitted(self, event: events.RequestAdmitted, adapter_wait: float | None) -> None:
        label = self.labels.of(event.adapter)
        self._queue.at((label,)).observe(event.queue_seconds)
        if adapter_wait is not None:
            self._adapter_wait.at((label,)).observe(adapter_wait)

    def first_token(self, event: events.FirstToken) -> None:
        series = self._ttft.at((self.labels.of(event.adapter),))
        series.observe_request(event.seconds, event.request_id, self._clock())

    def interval(self, interval: events.TokenInterval) -> None:
        series = self._inter_token.at((self.labels.of(interval.adapter),))
        series.observe(interval.seconds, interval.tokens)

    def proposed(self, event: events.TokensProposed) -> None:
        label = self.labels.of(event.adapter)
        self._proposed.inc((label,), event.proposed)
        self._accepted.inc((label,), event.accepted)

    def ended(self, event: events.RequestEnded) -> None:
        label = self.labels.of(event.adapter)
        self._e2e.at((label,)).observe_request(event.seconds, event.request_id, self._clock())
        self._prompt.inc((label,), event.prompt_tokens)
        self._generation.inc((label,), event.output_tokens)
        self._finished.inc((label, event.reason))
