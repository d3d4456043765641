"""FleetClient: a fleet of replicas with the interface of one engine."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import msgspec

from aioengine import errors
from aioengine.adapters.read_threads import SharedRead
from aioengine.events import Event
from aioengine.fleet.config import FleetConfig
from aioengine.fleet.gateway.adapters import FleetAdapters
from aioengine.fleet.gateway.call import Call
from aioengine.fleet.gateway.dispatcher import Dispatcher
from aioengine.fleet.gateway.grammars import FleetGrammars, SentGrammar
from aioengine.fleet.gateway.head import Head
from aioengine.fleet.gateway.limits import share_limits
from aioengine.fleet.gateway.members import Members
from aioengine.fleet.gateway.metrics import FleetMetrics, fleet_stats
from aioengine.fleet.registry import registry_actor
from aioengine.info import EngineState, EngineStats
from aioengine.memory_plan import MemoryPlan
from aioengine.model.pooling import read_label_names
from aioengine.request import (
    Prompt,
    RequestKeywords,
    RequestOptions,
    SamplingParams,
)
from aioengine.runtime.output import RequestOutput, SoFar
from aioengine.runtime.text_work import TextWork, tokenize

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

    from aioengine.grammars.limits import GrammarLimits
    from aioengine.model.text.tokenizer import Tokenizer
    from aioengine.server.access.gate import Gate


class FleetClient(FleetAdapters):
    """Sends requests to the replicas of ``handle``: an :class:`~aioengine.runtime.client.EngineClient`.

    Args:
        config: The configuration that the replicas were deployed with.
        handle: Serve's handle of their deployment.
        plan: Memory plan of a replica.
        model_path: Where the model's tokenizer is on this machine.
        tracer_provider: Requests are traced if there is one. The caller closes it.
        gateway: This gateway's name among others; None: any.
    """

    def __init__(
        self,
        config: FleetConfig,
        handle: Any,
        plan: MemoryPlan,
        model_path: Path | None,
        tokenizer: Tokenizer | None,
        tracer_provider: TracerProvider | None = None,
        *,
        gateway: str | None = None,
    ) -> None:
        gateway = uuid.uuid4().hex if gateway is None else gateway
        super().__init__(config, Members(config, handle, gateway=gateway))
        self.config = config.engine
        self.model_name = config.engine.model_name
        self.text_work = TextWork()
        self.leaving = False
        """Whether new requests are refused; the server of the fleet sets it."""
        self.plan = plan
        self.model_path = model_path
        self.label_names = SharedRead("aioengine-labels", lambda: read_label_names(model_path))
        self.tokenizer = tokenizer
        self._dispatcher = Dispatcher(self.members)
        self.metrics = FleetMetrics(
            self.members, self._dispatcher, lambda: "degraded" if self.degraded else self.state
        )
        self._dispatcher.digest_of = self.known.digest
        self._ledger: Gate | None = None
        """What has limits, if anything has."""
        self._tracer_provider = tracer_provider
        self._keys = count()
        self._seeds = random.Random(config.engine.seed)
        self._ids: dict[str, Call] = {}
        self._state: EngineState = "new"
        self._head: Head | None = None

    # Life cycle

    async def start(self, within: float | None = 120.0) -> None:
        """Wait until every replica has reported. Raises EngineStopped if one has not after ``within``
        seconds; None waits for ever."""
        self._state = "starting"
        self.members.start()
        self.metrics.start()
        registry = registry_actor(self.fleet_config.name, self.fleet_config.registry)
        # Keys, of which [server] may have some, are not stored with the registry.
        shared = msgspec.json.encode(msgspec.structs.replace(self.fleet_config, server={}))
        sharing = share_limits(self.members.gateway, shared, registry, lambda: self._ledger)
        self._background.spawn(sharing)  # so that this gateway does not count as gone while replicas start
        await self.members.complete(within)
        await self.start_adapters(registry)
        self._state = "running"

    async def stop(self) -> None:
        """End all requests with EngineStopped. The replicas keep running."""
        if self._state == "stopped":
            return
        self._state = "stopped"
        stopped = errors.EngineStopped("the server was stopped before the request finished")
        for call in self._ids.values():
            if not call.ended:  # also one that runs nowhere now
                call.fail(stopped)
        await self.stop_adapters()
        await self.members.stop(stopped)
        await self.text_work.close()

    def watch_head(self, address: str) -> None:
        """Notice when nothing answers at the address of Ray's head any more; see :meth:`until_dead`."""
        self._head = Head(address)

    @property
    def state(self) -> EngineState:
        """State: "running" while a replica takes requests, or while no replica is needed."""
        members = self.members
        if self._state == "running" and (self.leaving or self.failure is not None):
            return "draining"
        if self._state == "running" and not members.state.view.accepting and not members.asleep:
            return "starting"
        return self._state

    @property
    def degraded(self) -> bool:
        """Whether a replica is lost and has not come back yet. Requests go to the others."""
        return self.state == "running" and self.members.missing > 0

    @property
    def failure(self) -> errors.EngineDead | None:
        """Set while Ray's head does not answer; the gateway outlives every other loss."""
        return None if self._head is None else self._head.failure

    def step_age(self) -> float:
        """Smallest step age of the replicas, because the fleet makes progress as long as one replica does."""
        statuses = [member.status for member in self.members.members.values()]
        return min((status.step_age for status in statuses if status is not None), default=0.0)

    async def until_dead(self) -> errors.EngineDead:
        """Wait until Ray's head is lost, and then until accepted requests have ended, at most
        ``FINISH_SECONDS``; for ever if it is not watched. Meanwhile new requests are refused; if the head is
        back in time, all goes on. Lost replicas end nothing: they come back, or others take their place."""
        if self._head is None:
            await asyncio.Event().wait()
        assert self._head is not None
        lost = await self._head.until_lost(needed=lambda: bool(self._ids))
        self._state = "dead"
        return lost

    # Requests

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        **keywords: Unpack[RequestKeywords],
    ) -> AsyncGenerator[RequestOutput, None]:
        """Run one request as ``AsyncEngine.generate`` does. If its replica is lost, the request continues on
        another one; after ``migration_limit`` losses it raises EngineDead."""
        self._check_running()
        call = await self._accept(prompt, params, RequestOptions(**keywords))
        failed: errors.AioEngineError | None = None
        try:
            await self._dispatcher.place(call)
            while True:
                new = await call.next()
                yield new
                if new.finished:
                    return
        except errors.AioEngineError as error:
            failed = error
            raise
        finally:
            if self._ids.get(call.request_id) is call:
                del self._ids[call.request_id]
            self._dispatcher.abandon(call)
            if call.spans is not None:
                call.spans.end(failed)

    async def complete(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        follow: Callable[[SoFar], None] | None = None,
        **keywords: Unpack[RequestKeywords],
    ) -> RequestOutput:
        """Return the last output of :meth:`generate`. ``follow`` is as in ``AsyncEngine.complete``."""
        last: RequestOutput | None = None
        if follow is not None:
            follow(lambda: last)
        async for output in self.generate(prompt, params, **keywords):
            last = output
        assert last is not None
        return last

    async def abort(self, request_id: str) -> bool:
        """End a request; its reader gets a last output with ``finish_reason="abort"``."""
        call = self._ids.pop(request_id, None)
        if call is None:
            return False
        self._dispatcher.abandon(call)
        call.finish("abort")
        return True

    async def _accept(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        options: RequestOptions,
    ) -> Call:
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise errors.RequestInvalid(f"params must be SamplingParams, not {type(params).__name__}")
        if params.constraint is not None and not isinstance(params.constraint, SentGrammar):
            raise errors.RequestInvalid(
                f"constraint={params.constraint!r}: it cannot leave this process; use Guide(client)"
            )
        now, key = asyncio.get_running_loop().time(), next(self._keys)
        # Another gateway may send the same replica its own first request.
        request_id = options.request_id or f"request-{self.members.gateway[:8]}-{key}"
        if request_id in self._ids:
            raise _in_use(request_id)
        if params.seed is None:  # drawn now, so that any replica that continues draws the same tokens
            params = msgspec.structs.replace(params, seed=self._seeds.getrandbits(63))
        versions = [name for name in options.named if "@" in name]
        contents = {version: await self.content(version) for version in versions}
        tokens = await tokenize(
            prompt,
            options.tenant,
            vocab=2**31,  # replicas compare with the model's vocabulary
            limit=self.plan.max_model_len,
            tokenizer=self.tokenizer,
            work=self.text_work,
        )
        if request_id in self._ids:  # another one may have come meanwhile
            raise _in_use(request_id)
        call = Call(key, request_id, tokens, params, options, now, contents)
        if self._tracer_provider is not None:
            from aioengine.metrics.remote_spans import CallSpans

            call.spans = CallSpans(self._tracer_provider, request_id, call.wanted)
        self._ids[request_id] = call
        return call

    def limit_waiting(self, max_waiting: Mapping[str, int]) -> None:
        """Bound waiting requests as ``AsyncEngine.limit_waiting`` does; each replica gets its share of the
        bound, rounded up."""
        self._dispatcher.limit_waiting(max_waiting)

    def share_limits(self, ledger: Gate) -> None:
        """Make the limits of ``ledger`` apply to all gateways of this fleet together."""
        self._ledger = ledger

    def grammars(self, limits: GrammarLimits | None = None) -> FleetGrammars:
        """Compiler that only checks grammars' sizes; the replica that runs the request compiles them."""
        return FleetGrammars(limits)

    # Watching

    def stats(self) -> EngineStats:
        """Return the sums over all replicas; the slots are listed replica by replica."""
        return fleet_stats(self.members)

    def add_listener(self, listener: Callable[[Event], None], *types: type[Event]) -> Callable[[], None]:
        """Accept a listener that gets no events, because replicas send none: read :meth:`stats` and
        :meth:`adapters`."""
        return lambda: None

    def _check_running(self) -> None:
        if self.failure is not None:
            raise errors.EngineStopped(f"the fleet accepts no requests: {self.failure}")
        if self._state != "running":
            raise errors.EngineStopped(f"the fleet accepts no requests: it is {self._state}")

    def _check_lora(self) -> None:
        self._check_running()
        super()._check_lora()


def _in_use(request_id: str) -> errors.RequestInvalid:
    return errors.RequestInvalid(f"request_id={request_id!r} is in use by a request that has not ended")
