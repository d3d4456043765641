"""Numbers of the whole fleet: sums over the replicas, and one scrape with the series of every replica, with a
label ``replica``, and those of the gateway."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from aioengine.fleet.gateway.dispatcher import Dispatcher
from aioengine.fleet.gateway.members import Members
from aioengine.info import EngineStats, is_mix
from aioengine.metrics.collect.http import HttpMetrics
from aioengine.metrics.collect.on_loop import OnLoop
from aioengine.metrics.collect.snapshot import ProcessMetrics, engine_state
from aioengine.metrics.families.definitions import ALL, FLEET, Labels
from aioengine.metrics.families.exposition import TextWriter, to_metric
from aioengine.metrics.families.storage import Family, Store, Value, gauge, merged

logger = logging.getLogger("aioengine.fleet")

SCRAPE_SECONDS = 3.0
"""Seconds after which a replica is left out of a scrape."""
GATEWAY = "door"
"""The value of ``replica`` in the gateway's own series."""
_ROUTE = "fleet_route_seconds"
_families = msgspec.msgpack.Decoder(list[Family])


class FleetMetrics(Collector):
    """Metrics of a fleet, with the interface that a server needs. Any thread except the loop's may scrape
    it. ``state`` returns the gateway's state, or "degraded"."""

    def __init__(self, members: Members, dispatcher: Dispatcher, state: Callable[[], str]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self._members = members
        self._dispatcher = dispatcher
        self._engine = members.config.engine.name
        self.http = HttpMetrics(members.config.engine.max_adapter_labels)
        self.dropped_log_lines: Callable[[], int] = int
        """Function that counts the gateway's dropped log lines; called at each scrape."""
        self._state = state
        self._process: ProcessMetrics | None = None
        self._writer = TextWriter()
        self._store = Store({_ROUTE: FLEET[_ROUTE]})
        dispatcher.on_route = lambda seconds, route: self._store.observe(_ROUTE, seconds)
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
        return self._writer.answer(self.families(source), accept)

    def collect(self) -> Iterator[Metric]:
        return map(to_metric, self.families())

    def describe(self) -> Iterator[Metric]:
        return (to_metric(Family(definition, [])) for definition in ALL.values())

    def families(self, source: str | None = None) -> list[Family]:
        """Return the metrics of all replicas that answer and of the gateway, or those of one of
        :meth:`sources`. Raises TimeoutError if the gateway's loop is too busy."""
        found = self._on_loop.call(self._own) if source in (None, GATEWAY) else []
        if source != GATEWAY:
            assert self._loop is not None
            scrape = asyncio.run_coroutine_threadsafe(self._scrape(source), self._loop)
            for replica, data in scrape.result(SCRAPE_SECONDS + 2).items():
                try:
                    found += [_labelled(family, replica) for family in _families.decode(data)]
                except msgspec.MsgspecError as error:  # it is of another version
                    logger.warning("replica %s: its metrics cannot be read: %s", replica, error)
        # First as this version defines them: of another one, a replica may have other labels.
        names = {family.definition.name for family in found}
        own = [_labelled(Family(known, []), "") for known in ALL.values() if known.name in names]
        return merged([*own, *found])

    def _own(self) -> list[Family]:
        """Return those of the gateway, on its loop."""
        engine, members, sent = self._engine, self._members, self._dispatcher
        adapters = members.state.view.adapters.items()
        wanted = {name: len(adapter.target_holders) for name, adapter in adapters if adapter.target_holders}
        # From what replicas say that they have: clients make up names of mixes and of adapters.
        held = Counter(
            name
            for member in members.members.values()
            for name in {info.name for info in member.residency.adapters}
            if not is_mix(name)
        )
        by_label: dict[str, Mapping[str, int]] = {
            "fleet_decisions": sent.guard.reasons,
            "fleet_router_failures": sent.guard.failures,
            "fleet_migrations": sent.migrations,
            "fleet_losses": members.losses,
            "fleet_adapter_copies": {**dict.fromkeys(wanted, 0), **held},
            "fleet_adapter_copies_wanted": wanted,
        }
        values: dict[str, Value] = {
            "fleet_misroutes": sent.misroutes,
            "fleet_adapter_conflicts": members.conflicts,
            "fleet_replicas_wanted": members.wanted,
            "log_dropped": self.dropped_log_lines(),
        }
        for name, counted in by_label.items():
            # Prometheus sees no increase in a series that begins with its first event.
            series: dict[Labels, float] = dict.fromkeys(FLEET[name].initial, 0.0)
            for label, number in counted.items():
                series[(label,)] = number
            values[name] = series
        found = [gauge(engine, name, value) for name, value in values.items()]
        found += [*self._store.families(engine), *self.http.families(engine)]
        found.append(engine_state(engine, self._state()))
        if self._process is not None:
            found += self._process.families(engine)
        labelled = [_labelled(family, GATEWAY) for family in found]
        for replica, view in members.state.view.replicas.items():
            member = members.members.get(replica)
            there: dict[str, float] = {
                "fleet_replica_up": view.accepting,
                "fleet_knowledge_age_seconds": view.age,
                "fleet_replica_requests": 0 if member is None else len(member.channel.calls),
            }
            labelled += [_labelled(gauge(engine, name, value), replica) for name, value in there.items()]
        return labelled

    async def _scrape(self, only: str | None) -> dict[str, bytes]:
        """Return what each replica that answers has encoded, or one."""
        call = self._members.handle.options(method_name="scrape")
        found: dict[str, bytes] = {}

        async def one(replica: str) -> None:
            try:
                async with asyncio.timeout(SCRAPE_SECONDS):
                    found[replica] = await call.remote(to=replica)
            except Exception:
                pass  # it is lost or does not answer: its absence and the age of its report show that

        await asyncio.gather(*[one(replica) for replica in self._members.members if only in (None, replica)])
        return found


def _labelled(family: Family, replica: str) -> Family:
    definition, points = family
    labels = (*definition.labels, "replica")
    return Family(definition._replace(labels=labels), [((*own, replica), point) for own, point in points])


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
