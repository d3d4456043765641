"""Numbers of the whole fleet: sums over the replicas, and one scrape with the series of every replica, with a
label ``replica``, and those of the gateway."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from aioengine.fleet.gateway.dispatcher import Dispatcher
from aioengine.fleet.gateway.members import CAUSES, Members
from aioengine.info import EngineStats, is_mix
from aioengine.metrics.collect.http import HttpMetrics
from aioengine.metrics.collect.on_loop import OnLoop
from aioengine.metrics.collect.snapshot import ProcessMetrics, engine_state
from aioengine.metrics.families.exposition import TextWriter
from aioengine.metrics.families.storage import Family, gauge
from aioengine.schedulers.routing.guard import FAILURES

SCRAPE_SECONDS = 3.0
"""Seconds after which a replica is left out of a scrape."""
GATEWAY = "door"
"""The value of ``replica`` in the gateway's own series."""
_TEXT = "text/plain"
_SAMPLE = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(\{)?")
_BUCKETS = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 5e-3, 2e-2)


class FleetMetrics:
    """Metrics of a fleet, with the interface that a server needs. Any thread except the loop's may scrape
    it. ``state`` returns the gateway's state, or "degraded"."""

    def __init__(self, members: Members, dispatcher: Dispatcher, state: Callable[[], str]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_AllReplicas(self))
        self.own = CollectorRegistry()
        """Registry of the gateway's own metrics."""
        self.own.register(_Gateway(members, dispatcher))
        self._members = members
        self._engine = members.config.engine.name
        self.http = HttpMetrics(members.config.engine.max_adapter_labels)
        self.dropped_log_lines: Callable[[], int] = int
        """Function that counts the gateway's dropped log lines; called at each scrape."""
        self._state = state
        self._process: ProcessMetrics | None = None
        self._writer = TextWriter()
        seconds = Histogram(
            "aioengine_fleet_route_seconds",
            "Time that a routing decision took.",
            ["engine", "replica"],
            registry=self.own,
            buckets=_BUCKETS,
        )
        decisions = seconds.labels(self._engine, GATEWAY)
        dispatcher.on_route = lambda seconds, route: decisions.observe(seconds)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_loop = OnLoop()

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_loop = OnLoop()

    def export_process(self) -> None:
        """Export the gateway's own process from now on, if the gateway is the whole process."""
        self._process = ProcessMetrics()

    def sources(self) -> list[str]:
        """Return the values of ``replica``; each can be scraped separately."""
        return [GATEWAY, *self._members.members]

    def expose(self, accept: str, source: str | None = None) -> tuple[bytes, str]:
        """Return the text of a scrape and its content type, for all replicas or for one of :meth:`sources`.
        Raises TimeoutError if the gateway's loop is too busy."""
        encode, content_type = choose_encoder(accept)
        kind = "application/openmetrics-text" if "openmetrics" in content_type else _TEXT
        if source not in (None, GATEWAY):
            return _merged(self.scraped(kind, source), openmetrics=kind != _TEXT).encode(), content_type
        gateway = self._writer.write(self._on_loop.call(self._families), openmetrics=kind != _TEXT).decode()
        texts = [("", encode(self.own).decode()), (GATEWAY, gateway)]
        if source is None:
            texts += self.scraped(kind)
        return _merged(texts, openmetrics=kind != _TEXT).encode(), content_type

    def _families(self) -> list[Family]:
        """Return those of the gateway that an engine has, too."""
        engine = self._engine
        found = [
            *self.http.families(engine),
            engine_state(engine, self._state()),
            gauge(engine, "log_dropped", self.dropped_log_lines()),
        ]
        return found if self._process is None else [*found, *self._process.families(engine)]

    def scraped(self, accept: str, replica: str | None = None) -> list[tuple[str, str]]:
        """Return (replica, text) of each replica that answers, or of one."""
        assert self._loop is not None
        asked = asyncio.run_coroutine_threadsafe(self._scrape(accept, replica), self._loop)
        return asked.result(SCRAPE_SECONDS + 2)

    async def _scrape(self, accept: str, only: str | None) -> list[tuple[str, str]]:
        call = self._members.handle.options(method_name="scrape")

        async def one(replica: str) -> tuple[str, str] | None:
            try:
                async with asyncio.timeout(SCRAPE_SECONDS):
                    return replica, await call.remote(accept, to=replica)
            except (
                Exception
            ):  # it is lost or does not answer: its absence and the age of its report show that
                return None

        found = await asyncio.gather(
            *[one(replica) for replica in self._members.members if only in (None, replica)]
        )
        return [each for each in found if each is not None]


class _AllReplicas(Collector):
    def __init__(self, metrics: FleetMetrics) -> None:
        self._metrics = metrics

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        text, _ = self._metrics.expose(_TEXT)
        yield from text_string_to_metric_families(text.decode())


class _Gateway(Collector):
    """Collector of the gateway's own numbers, read at each scrape."""

    def __init__(self, members: Members, dispatcher: Dispatcher) -> None:
        self._members = members
        self._dispatcher = dispatcher
        self._engine = members.config.engine.name

    def collect(self) -> Iterator[Metric]:
        members, sent = self._members, self._dispatcher
        yield self._counts("decisions", "Routing decisions by reason.", "reason", sent.guard.reasons)
        yield self._counts(
            "router_failures", "What the router got wrong.", "kind", _all(FAILURES, sent.guard.failures)
        )
        yield self._counts(
            "migrations",
            "Requests that went on at another replica, by what became of theirs.",
            "cause",
            _all((*CAUSES, "refused"), sent.migrations),
        )
        yield self._counts("losses", "Replicas that were lost.", "cause", _all(CAUSES, members.losses))
        yield self._counts(
            "misroutes",
            "Requests that went to a replica for an adapter in its memory, which was not there any more.",
            None,
            {"": sent.misroutes},
        )
        yield self._counts(
            "adapter_conflicts",
            "Adapters that were found with different content on two replicas.",
            None,
            {"": members.conflicts},
        )
        wanted = self._gauge("replicas_wanted", "Replicas that the fleet should have.")
        wanted.add_metric([self._engine, GATEWAY], members.wanted)
        yield wanted
        yield from self._replicas()
        yield from self._copies()

    def _replicas(self) -> Iterator[Metric]:
        up = self._gauge("replica_up", "1 if it takes requests.")
        age = self._gauge("knowledge_age_seconds", "Age of its last report.")
        sent = self._gauge("replica_requests", "Its requests of this gateway.")
        for replica, view in list(self._members.state.view.replicas.items()):
            labels = [self._engine, replica]
            member = self._members.members.get(replica)
            up.add_metric(labels, float(view.accepting))
            age.add_metric(labels, view.age)
            sent.add_metric(labels, 0 if member is None else len(member.channel.calls))
        yield from (up, age, sent)

    def _copies(self) -> Iterator[Metric]:
        had = self._gauge("adapter_copies", "Replicas that hold it.", "adapter")
        wanted = self._gauge("adapter_copies_wanted", "Replicas that should, by the plan.", "adapter")
        # From what replicas say that they have: clients make up names of mixes and of adapters.
        members = list(self._members.members.values())
        held = Counter(name for member in members for name in {i.name for i in member.residency.adapters})
        adapters = list(self._members.state.view.adapters.items())
        targets = {name: len(adapter.target_holders) for name, adapter in adapters if adapter.target_holders}
        for name in held.keys() | targets.keys():
            if not is_mix(name):
                had.add_metric([self._engine, GATEWAY, name], held[name])
        for name, count in targets.items():
            wanted.add_metric([self._engine, GATEWAY, name], count)
        yield from (had, wanted)

    def _counts(self, name: str, help_: str, label: str | None, values: Mapping[str, int]) -> Metric:
        labels = ["engine", "replica", *([] if label is None else [label])]
        family = CounterMetricFamily(f"aioengine_fleet_{name}", help_, labels=labels)
        for value, number in list(values.items()):
            family.add_metric([self._engine, GATEWAY, value][: len(labels)], number)
        return family

    def _gauge(self, name: str, help_: str, *labels: str) -> GaugeMetricFamily:
        return GaugeMetricFamily(f"aioengine_fleet_{name}", help_, labels=["engine", "replica", *labels])


def _all(labels: Iterable[str], counted: Mapping[str, int]) -> dict[str, int]:
    """Return what was counted, and 0 for the other labels: Prometheus sees no increase in a series that
    begins with its first event."""
    return {**dict.fromkeys(labels, 0), **counted}


def _merged(texts: list[tuple[str, str]], *, openmetrics: bool) -> str:
    """Merge scrapes, because the format requires each metric's samples in one group. A text whose replica is
    "" has its labels already."""
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for replica, text in texts:
        label = f'replica="{replica}"'
        metric = ""
        for line in text.splitlines():
            if line.startswith("# EOF") or not line:
                continue
            if line.startswith("# "):
                _, kind, name, *_ = line.split(" ", 3)
                if name != metric:
                    metric = name
                    samples.setdefault(metric, [])
                    heads.setdefault(metric, [])
                if line not in heads[metric] and not any(h.startswith(f"# {kind} ") for h in heads[metric]):
                    heads[metric].append(line)
                continue
            samples.setdefault(metric, []).append(_labelled(line, label) if replica else line)
    lines = [line for metric in samples for line in (*heads.get(metric, ()), *samples[metric])]
    if openmetrics:
        lines.append("# EOF")
    return "\n".join(lines) + "\n"


def _labelled(line: str, label: str) -> str:
    found = _SAMPLE.match(line)
    if found is None:
        return line
    rest = line[found.end() :]
    if found[2] is None:
        return f"{found[1]}{{{label}}}{rest}"
    return f"{found[1]}{{{label}{'' if rest.startswith('}') else ','}{rest}"


def fleet_stats(members: Members) -> EngineStats:
    """Return sums over the replicas. Totals since their start are in the replicas' own metrics."""
    there = list(members.members.values())
    slots = tuple(
        msgspec.structs.replace(slot, replica=member.channel.replica)
        for member in there
        for slot in member.residency.slots
    )
    reports = [member.status.report for member in there if member.status is not None]
    held = [info for member in there for info in member.residency.versions]
    block = members.config.engine.block_size
    fields = msgspec.structs.fields(EngineStats)
    values: dict[str, Any] = {field.name: 0 for field in fields if field.required}
    values |= {
        "slots": slots,
        "cpu_adapters": sum(info.location != "disk" for info in held),
        "cpu_capacity": sum(member.hello.cpu_loras for member in there),
        "adapters": len({info.name for member in there for info in member.residency.adapters}),
        "running": sum(report.running for report in reports),
        "waiting": sum(report.waiting for report in reports),
        "block_size": block,
        "kv_blocks": sum(member.hello.kv_tokens for member in there) // block,
        "kv_blocks_free": sum(report.free_kv_tokens for report in reports) // block,
    }
    return EngineStats(**values)
