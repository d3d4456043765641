"""What every counter and histogram must be, worked out from the recorded events the slow, plain way.

Nothing here is shared with the metrics: each number is found by going through the whole record again.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from aioengine import events as e
from aioengine.metrics.families import definitions

Key = tuple[str, frozenset[tuple[str, str]]]


class Truth:
    def __init__(self, record: list[e.Event]) -> None:
        self.record = record
        self.numbers: dict[Key, float] = {}
        self.observations: dict[tuple[str, tuple[tuple[str, str], ...]], list[float]] = defaultdict(list)
        self._count_adapters()
        self._count_requests()
        self._count_steps()
        for (name, labels), values in self.observations.items():
            self._histogram(name, dict(labels), values)

    # Tools

    def of(self, *kinds: type[Any], **fields: object) -> list[Any]:
        return [
            event
            for event in self.record
            if isinstance(event, kinds) and all(getattr(event, k) == v for k, v in fields.items())
        ]

    def numbered(self, kind: type[Any]) -> Iterator[tuple[int, Any]]:
        return ((i, event) for i, event in enumerate(self.record) if isinstance(event, kind))

    def count(self, name: str, amount: float, **labels: str) -> None:
        key = (f"aioengine_{name}_total", frozenset({"engine": "default", **labels}.items()))
        self.numbers[key] = self.numbers.get(key, 0.0) + amount

    def observe(self, name: str, value: float, **labels: str) -> None:
        self.observations[name, tuple(labels.items())].append(value)

    def _histogram(self, name: str, labels: dict[str, str], values: list[float]) -> None:
        full = f"aioengine_{name}"
        bounds = definitions.ALL[name].buckets
        labels = {"engine": "default", **labels}
        for bound in (*bounds, float("inf")):
            text = "+Inf" if bound == float("inf") else repr(bound)
            key = (f"{full}_bucket", frozenset({**labels, "le": text}.items()))
            self.numbers[key] = sum(value <= bound for value in values)
        self.numbers[f"{full}_count", frozenset(labels.items())] = len(values)
        self.numbers[f"{full}_sum", frozenset(labels.items())] = sum(values)

    # State at a place in the record

    def current(self, adapter: str, index: int) -> int | None:
        """The version that a request accepted at ``index`` gets."""
        found = None
        for event in self.record[:index]:
            if isinstance(event, e.AdapterRegistered) and event.adapter == adapter:
                found = event.version
            elif isinstance(event, e.AdapterUnloaded) and (event.adapter, event.version) == (adapter, found):
                found = None
        return found

    def held(self, adapter: str, version: int | None, level: str, index: int) -> bool:
        came: tuple[type[Any], ...] = (e.AdapterPlaced,) if level == "slot" else (e.AdapterLoaded,)
        found = False
        for event in self.record[:index]:
            if not isinstance(event, e.AdapterEvent) or (event.adapter, event.version) != (adapter, version):
                continue
            if isinstance(event, came):
                found = True
            elif isinstance(event, e.AdapterEvicted) and event.level == level:
                found = False
        return found

    def label(self, adapter: str | None, index: int) -> str:
        """Where the count of an event at ``index`` stands at the end of the record."""
        if adapter is None:
            return "base"
        for later in range(index, len(self.record)):
            event = self.record[later]
            gone = isinstance(event, e.AdapterUnloaded) and event.adapter == adapter
            if gone and self.current(adapter, later + 1) is None:
                return "other"
        return adapter

    def waiting(self, adapter: str, version: int, index: int) -> int:
        """Requests for this version that wait at ``index``."""
        waiting: set[str] = set()
        for place, event in enumerate(self.record[:index]):
            if isinstance(event, e.RequestAdded) and event.adapter == adapter:
                if self.current(adapter, place) == version:
                    waiting.add(event.request_id)
            elif isinstance(event, (e.RequestAdmitted, e.RequestEnded)):
                waiting.discard(event.request_id)
            elif isinstance(event, e.RequestPreempted) and event.adapter == adapter:
                added = next(i for i, a in self.numbered(e.RequestAdded) if a.request_id == event.request_id)
                if self.current(adapter, added) == version:
                    waiting.add(event.request_id)
        return len(waiting)

    def absent(self, adapter: str, version: int | None, start: int, end: int) -> float:
        """Seconds between two events during which this version was in no slot."""
        total, since = 0.0, self.record[start].time
        away = not self.held(adapter, version, "slot", start)
        for place in range(start, end + 1):
            now = self.record[place].time
            if away:
                total += now - since
            since = now
            away = not self.held(adapter, version, "slot", place + 1)
        return total

    def blocked(self, adapter: str, version: int, index: int) -> bool:
        """On the CPU, in no slot and on the way to none, and requests wait for it."""
        copying = False
        for event in self.record[:index]:
            if isinstance(event, e.AdapterEvent) and (event.adapter, event.version) == (adapter, version):
                if isinstance(event, e.AdapterPlacing):
                    copying = True
                elif isinstance(event, (e.AdapterPlaced, e.AdapterFailed)):
                    copying = False
        on_cpu, in_slot = (self.held(adapter, version, level, index) for level in ("cpu", "slot"))
        return on_cpu and not in_slot and not copying and self.waiting(adapter, version, index) > 0

    # The metrics

    def _count_adapters(self) -> None:
        for kind in ("load", "evict", "replace"):
            self.count("lora_swaps", 0, kind=kind)
        self.count("lora_swaps", len(self.of(e.AdapterPlaced)), kind="load")
        self.count("lora_swaps", len(self.of(e.AdapterEvicted, level="slot")), kind="evict")
        replaced = [event for event in self.of(e.AdapterRegistered) if event.replaces is not None]
        self.count("lora_swaps", len(replaced), kind="replace")
        for stage, kind in (("disk", e.AdapterLoaded), ("slot", e.AdapterPlaced)):
            for event in self.of(kind):
                self.observe("lora_swap_seconds", event.seconds, stage=stage)
                self.count("lora_swap_bytes", event.nbytes, stage=stage)
        for index, event in self.numbered(e.AdapterPlacing):
            begin = index
            while self.blocked(event.adapter, event.version, begin):
                begin -= 1
            if begin < index:
                waited = event.time - self.record[begin].time
                self.observe("lora_swap_seconds", waited, stage="cpu")
        for reason in ("invalid", "too_large", "io", "internal"):
            failures = len(self.of(e.AdapterFailed, reason=reason))
            self.count("lora_load_failures", failures, reason=reason)
        for level in ("slot", "cpu"):
            for result in ("hit", "miss"):
                self.count("lora_cache_requests", 0, level=level, result=result)
        for index, event in self.numbered(e.RequestAdded):
            if event.adapter is not None:
                version = self.current(event.adapter, index)
                assert (event.location == "slot") == self.held(event.adapter, version, "slot", index)
                self._look(event.location)
        for result in ("used", "wasted", "late"):
            self.count("lora_prefetch", 0, result=result)
        for index, event in self.numbered(e.AdapterLoading):
            result = self._came_of(event, index)
            if result:
                self.count("lora_prefetch", 1, result=result)

    def _look(self, location: str | None) -> None:
        self.count("lora_cache_requests", 1, level="slot", result="hit" if location == "slot" else "miss")
        if location != "slot":
            result = "hit" if location == "cpu" else "miss"
            self.count("lora_cache_requests", 1, level="cpu", result=result)

    def _came_of(self, read: e.AdapterLoading, index: int) -> str | None:
        if self.waiting(read.adapter, read.version, index):
            return "late"
        copying = False
        for event in self.record[index + 1 :]:
            if not isinstance(event, e.AdapterEvent):
                continue
            if (event.adapter, event.version) != (read.adapter, read.version):
                continue
            match event:
                case e.AdapterPlacing():
                    copying = True
                case e.AdapterPlaced():
                    return "used"
                case e.AdapterEvicted(level="cpu"):
                    return "wasted"
                case e.AdapterFailed():
                    if not copying:
                        return None
                    copying = False
        return None

    def _count_requests(self) -> None:
        for name in ("preemptions", "prompt_cached_tokens"):
            self.count(name, 0)
        self.count("preemptions", len(self.of(e.RequestPreempted)))
        for index, event in self.numbered(e.RequestAdmitted):
            if event.resumed:
                continue
            label = self.label(event.adapter, index)
            self.observe("request_queue_seconds", event.queue_seconds, adapter=label)
            self.count("prompt_cached_tokens", event.cached_tokens)
            if event.adapter is not None:
                added = next(i for i, a in self.numbered(e.RequestAdded) if a.request_id == event.request_id)
                version = self.current(event.adapter, added)
                wait = self.absent(event.adapter, version, added, index)
                self.observe("request_adapter_wait_seconds", wait, adapter=label)
        for index, event in self.numbered(e.FirstToken):
            self.observe("request_ttft_seconds", event.seconds, adapter=self.label(event.adapter, index))
        for index, event in self.numbered(e.RequestEnded):
            label = self.label(event.adapter, index)
            self.observe("request_e2e_seconds", event.seconds, adapter=label)
            self.count("prompt_tokens", event.prompt_tokens, adapter=label)
            self.count("generation_tokens", event.output_tokens, adapter=label)
            self.count("requests_finished", 1, adapter=label, reason=event.reason)
            if event.tenant is not None:
                self.count("tenant_requests", 1, tenant=event.tenant, reason=event.reason)
                self.count("tenant_prompt_tokens", event.prompt_tokens, tenant=event.tenant)
                self.count("tenant_generation_tokens", event.output_tokens, tenant=event.tenant)
        for index, event in self.numbered(e.StepFinished):
            for interval in event.intervals:
                for _ in range(interval.tokens):
                    label = self.label(interval.adapter, index)
                    self.observe("request_inter_token_seconds", interval.seconds, adapter=label)

    def _count_steps(self) -> None:
        for phase in ("prefill", "decode"):
            self.count("step_tokens", 0, phase=phase)
        for step in self.of(e.StepFinished):
            kinds = [k for k in ("prefill", "decode") if getattr(step, f"{k}_tokens")]
            self.observe("step_seconds", step.seconds, phase="mixed" if len(kinds) == 2 else kinds[0])
            self.count("step_tokens", step.prefill_tokens, phase="prefill")
            self.count("step_tokens", step.decode_tokens, phase="decode")
            self.observe("schedule_seconds", step.schedule_seconds)
            self.observe("policy_decision_seconds", step.policy_seconds)
            self.observe("batch_sequences", step.sequences)
            self.observe("batch_adapters", step.adapters)
            for slot in step.slots:
                self.count("lora_slot_busy_seconds", step.seconds, slot=str(slot))
        for name, kind in (
            ("policy_errors", e.PolicyFailed),
            ("policy_overruns", e.PolicyOverran),
            ("policy_replacements", e.PolicyReplaced),
        ):
            self.count(name, len(self.of(kind)))
        for reason, number in Counter(event.reason for event in self.of(e.PolicyRefused)).items():
            self.count("policy_refusals", number, reason=reason)
        refused = Counter(event.bound for event in self.of(e.RequestRefused))
        for bound in ("server", "tenant"):
            self.count("requests_refused", refused[bound], bound=bound)
        for event in self.of(e.LoopLag):
            self.observe("event_loop_lag_seconds", event.seconds)
