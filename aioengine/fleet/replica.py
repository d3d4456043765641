"""EngineReplica: one engine in a separate process, and its side of the channels to the gateways."""

from __future__ import annotations

import asyncio
import logging
import os
import platform
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import msgspec

from aioengine import events
from aioengine.engine import AsyncEngine
from aioengine.errors import AdapterNotFound, AioEngineError, EngineDead, EngineStopped
from aioengine.executors.process.wire import pack_error
from aioengine.fleet.config import FleetConfig
from aioengine.fleet.outbox import Outbox, Outboxes
from aioengine.fleet.replica_adapters import ReplicaAdapters
from aioengine.fleet.speeds import Speeds
from aioengine.fleet.wire import (
    Abort,
    ChannelName,
    Delta,
    Frame,
    Hello,
    LimitWaiting,
    Residency,
    Status,
    Submit,
    decode_orders,
    encode_frame,
    gone,
)
from aioengine.grammars.service import Grammars
from aioengine.info import without_versions
from aioengine.metrics.otlp import end_tracing, otlp_provider
from aioengine.request import SamplingParams
from aioengine.schedulers.routing import Report

logger = logging.getLogger("aioengine.fleet")

STATUS_SECONDS = 0.05
"""The shortest time between two reports to a gateway."""
MOVES = (
    events.AdapterLoaded,
    events.AdapterPlaced,
    events.AdapterEvicted,
    events.AdapterUnloaded,
    events.AdapterRegistered,
    events.EngineRestarted,
)
"""Events after which adapters are elsewhere."""


class EngineReplica:
    """The deployment's class. Serve makes it; every method is called over a handle. Most methods take ``to``,
    which names the replica that must answer: the request router sends the call there. If that replica is
    gone, Serve sends it to another, which raises LookupError: it must not answer in its place."""

    async def __init__(self, config: FleetConfig) -> None:  # type: ignore[misc] # Serve awaits it
        await self.begin(config, _own_id())

    async def begin(self, config: FleetConfig, name: str) -> None:
        """Start the engine. ``name``: the replica's id among the fleet's."""
        self._name = name
        self._config = config
        self._draining = False
        self._boxes = Outboxes()
        self._grammars: Grammars | None = None
        self._speed = Speeds()
        self.engine = await self.start_engine()
        self._adapters = ReplicaAdapters(self.engine, config.adapters)
        self.engine.add_listener(self._speed, *Speeds.HEARD)
        self._moves = 0
        """Number of changes of where adapters are."""
        self.engine.add_listener(self._moved, *MOVES)
        self._traces = otlp_provider(config.otlp_endpoint, resource={"service.instance.id": name})
        if self._traces is not None:
            from aioengine.metrics.tracing import trace_requests

            trace_requests(self.engine, self._traces)
        for name, path in config.adapters.items():
            self.engine.register_adapter(name, path)

    async def start_engine(self) -> AsyncEngine:
        """Return an engine that runs."""
        import torch

        torch.set_num_threads(self._config.cpus_per_replica)
        engine = AsyncEngine(self._config.engine)
        await engine.start()
        engine.metrics.export_process()
        return engine

    # Channels

    async def channel(self, channel: ChannelName, to: str | None = None) -> AsyncIterator[bytes]:
        """Yield a gateway's messages, as encoded frames, until the gateway stops listening or opens another
        channel. Then its requests end."""
        _check_own(to)
        loop = asyncio.get_running_loop()
        residency, due = -1, 0.0
        async with self._boxes.opened(channel) as box:
            yield encode_frame(Frame(hello=self._hello()))
            while not box.replaced:
                frame = Frame(deltas=box.take())
                now = loop.time()
                if now >= due or self._moves != residency:
                    due = now + STATUS_SECONDS
                    frame.status = self._status(box, now)
                    if self._moves != residency:
                        residency, frame.residency = self._moves, self._residency()
                yield encode_frame(frame)
                await box.filled(STATUS_SECONDS if box.busy else self._config.heartbeat_seconds)

    def _moved(self, event: events.Event) -> None:
        self._moves += 1

    async def submit(self, channel: ChannelName, orders: bytes, to: str | None = None) -> None:
        """Carry out a gateway's orders. Raises LookupError if this is not the gateway's latest channel."""
        _check_own(to)
        box = self._boxes.of(channel)
        for order in decode_orders(orders):
            match order:
                case Submit():
                    box.begin(order.key, self._run(box, order))
                case Abort():
                    box.abort(order.key)
                case LimitWaiting():
                    self.engine.limit_waiting(order.max_waiting)

    async def _run(self, box: Outbox, order: Submit) -> None:
        if self._traces is None:
            await self._generate(box, order)
            return
        from aioengine.metrics.remote_spans import carried

        with carried(order.trace):
            await self._generate(box, order)

    async def _generate(self, box: Outbox, order: Submit) -> None:
        options, asked = order.options, dict[str, str]()
        names, keywords = options.named, msgspec.structs.asdict(options)
        try:
            if self._draining:
                raise EngineStopped("the replica is draining")
            params = await self._params(order)
            scored = told = False  # what the gateway has already
            contents, scale = order.contents, None
            if order.content and len(names) == 1:
                contents, scale = [order.content], None if options.mix is None else options.mix[names[0]]
            wanted = zip(names, contents, strict=True)
            owns = [self._adapters.holding(name, content, scale) for name, content in wanted]
            asked = dict(zip(owns, names, strict=True))
            if order.believed and not options.mix:
                there = self.engine.find_adapter(without_versions(names[0]))
                if there is None or there.location == "disk":
                    box.put(Delta(order.key, misrouted=True))
            keywords["adapter"] = owns[0] if owns else None
            if options.mix is not None:
                keywords["adapter"] = mix = dict.fromkeys(owns, 0.0)
                for own, weight in zip(owns, options.mix.values(), strict=True):
                    mix[own] += weight  # a version may be named with its number and without
            # With batch invariance, computing all tokens at once gives the same bits.
            keywords["replay"] = options.replay and not self.engine.info.batch_invariant
            keywords["request_id"] = order.request_id
            outputs = self.engine.generate(order.prompt, params, **keywords)
            async with aclosing(outputs):
                async for output in outputs:
                    delta = Delta(order.key, output.token_ids_delta, output.text_delta)
                    if not told:
                        if output.token_ids_delta and order.content not in ("", output.adapter_digest):
                            raise gone(names[0])  # its next token would be of another text
                        delta.content, told = output.adapter_digest, True
                    delta.finish, delta.stop = output.finish_reason, output.stop_reason
                    delta.cached_tokens = output.cached_tokens
                    delta.logprobs = list(output.logprobs_delta)
                    if output.prompt_logprobs is not None and not scored:
                        delta.prompt_logprobs, scored = output.prompt_logprobs, True
                    delta.pooled = output.pooled
                    box.put(delta)
        except Exception as error:
            if not isinstance(error, AioEngineError):
                logger.exception("request %s failed unexpectedly", order.request_id)
                error = AioEngineError(f"the replica failed: {type(error).__name__}: {error}")
            if isinstance(error, AdapterNotFound) and "@" in error.name:
                error = gone(asked.get(error.name, error.name))  # not by the engine's own number
            box.put(Delta(order.key, error=pack_error(error)))

    async def _params(self, order: Submit) -> SamplingParams:
        constraint = None
        if order.grammar is not None:
            if self._grammars is None:
                self._grammars = self.engine.grammars()
            constraint = await self._grammars.constraint(order.grammar, order.options.tenant)
        return SamplingParams(**order.params, constraint=constraint)

    def _hello(self) -> Hello:
        lora, stats = self._config.engine.lora, self.engine.stats()
        return Hello(
            replica=self._name,
            pid=os.getpid(),
            node=platform.node(),
            slots=0 if lora is None else len(stats.slots),
            cpu_loras=0 if lora is None else lora.cpu_capacity,
            max_running=self._config.engine.max_num_seqs,
            kv_tokens=stats.kv_blocks * stats.block_size,
        )

    def _status(self, box: Outbox, now: float) -> Status:
        stats = self.engine.stats()
        report = Report(
            sent_at=now,
            received=box.received,
            ended=box.ended,
            waiting=stats.waiting,
            running=stats.running,
            waiting_tokens=stats.uncomputed_tokens,
            free_kv_tokens=stats.kv_blocks_free * stats.block_size,
            waiting_for={without_versions(name) or None: n for name, n in stats.waiting_for.items()},
            load_seconds=self._speed.load,
            slot_seconds=self._speed.slot,
            seconds_per_token=self._speed.token.seconds_per_token,
            service_seconds=self._speed.service,
        )
        return Status(report, self.engine.step_age(), self._draining, self.engine.state)

    def _residency(self) -> Residency:
        replaced = self.engine.replaced()
        old = {(info.name, info.version) for info in replaced}
        held = {  # of mixes of different versions, one
            without_versions(info.name): msgspec.structs.replace(info, name=without_versions(info.name))
            for info in self.engine.resident()
            if (info.name, info.version) not in old
        }
        return Residency(list(self.engine.stats().slots), list(held.values()), replaced)

    # Adapters

    async def adapter(self, action: str, arguments: dict[str, Any], to: str | None = None) -> Any:
        """Do what :meth:`ReplicaAdapters.call` describes. Returns its answer, or the error that it raised,
        because Ray would wrap a raised error."""
        _check_own(to)
        try:
            return await self._adapters.call(action, arguments)
        except AioEngineError as error:
            return error
        finally:
            self._boxes.wake()  # gateways hear of the change at once

    # Watching

    async def scrape(self, to: str | None = None) -> bytes:
        """Return the engine's metrics: encoded families."""
        _check_own(to)
        return await asyncio.to_thread(msgspec.msgpack.encode, self.engine.metrics.families())

    async def describe(self, to: str | None = None) -> dict[str, Any]:
        """Describe the replica's state, for people."""
        _check_own(to)
        stats = self.engine.stats()
        return {
            "replica": _own_id(),
            "pid": os.getpid(),
            "node": platform.node(),
            "state": "draining" if self._draining else self.engine.state,
            "running": stats.running,
            "waiting": stats.waiting,
            "kv_free": stats.kv_blocks_free / max(stats.kv_blocks, 1),
            "slots": [slot.adapter for slot in stats.slots],
        }

    async def drain(self, draining: bool = True, to: str | None = None) -> None:
        """Accept no new requests (or accept them again). Accepted requests finish."""
        _check_own(to)
        self._draining = draining

    async def check_health(self) -> None:
        """Raise an error if the engine has failed or hangs. Serve calls this, and then replaces the
        replica."""
        if self.engine.state == "dead":
            raise EngineDead("the engine has failed")
        took = self.engine.step_age()
        if took > self._config.step_seconds:
            raise EngineDead(f"a step has taken {took:.0f} s: the model hangs")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return what the scaling policy reads of a replica. Serve calls this."""
        return self._speed.demand(self.engine.stats())

    async def stop(self) -> None:
        await self._boxes.close()
        await self._adapters.stop()
        await self.engine.stop()
        if self._traces is not None:
            await end_tracing(self._traces)

    async def __del__(self) -> None:
        """End the engine. Serve awaits this when it removes the replica."""
        if hasattr(self, "engine"):
            await self.stop()


def _own_id() -> str:
    from ray import serve

    return str(serve.get_replica_context().replica_id.unique_id)


def _check_own(to: str | None) -> None:
    if to is not None and to != _own_id():
        raise LookupError(f"replica {to} is gone, and the call came to replica {_own_id()}")
