"""The replicas as a door knows them: channels, routing, and what happens when one is lost.

The file is long because a request, its channel and its replica change together here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from aioengine.errors import (
    AioEngineError,
    DeadlineExceeded,
    EngineDead,
    EngineOverloaded,
    EngineStopped,
)
from aioengine.fleet.config import FleetConfig
from aioengine.fleet.door.call import Call
from aioengine.fleet.door.channel import Channel
from aioengine.fleet.door.grammars import SentGrammar
from aioengine.fleet.wire import (
    Abort,
    Delta,
    Frame,
    Hello,
    LimitWaiting,
    Residency,
    Status,
    Submit,
    pack_params,
    unpack_error,
)
from aioengine.info import EngineStats, SlotInfo
from aioengine.schedulers.policy import Location
from aioengine.schedulers.routing import (
    FleetState,
    ReplicaLimits,
    Report,
    RouteRequest,
    RouterGuard,
    Tiers,
    load_router,
    prefix_hashes,
)

logger = logging.getLogger("aioengine.fleet")

WATCH_SECONDS = 0.25
MAX_TRIES = 16
"""Replicas that a request which has not begun is offered, one after the other."""


class Member:
    """A replica that has been heard of."""

    def __init__(self, channel: Channel, hello: Hello) -> None:
        self.channel = channel
        self.hello = hello
        self.status: Status | None = None
        self.residency = Residency([], [])
        self.ready = True
        """It knows the fleet's adapters."""


class Members:
    """All methods are called on one loop. ``door`` is this door's name among others."""

    def __init__(self, config: FleetConfig, handle: Any, *, door: str) -> None:
        self.config = config
        self.handle = handle
        self.state = FleetState(time.monotonic, silent_after=config.silent_seconds)
        self.guard = RouterGuard(
            load_router(config.router), timer=time.perf_counter, failed=self._router_failed
        )
        self.state.listeners.append(self.guard.tell)
        self.members: dict[str, Member] = {}
        self.migrations: Counter[str] = Counter()
        """Requests that went on elsewhere, by what became of their replica."""
        self.losses: Counter[str] = Counter()
        """Replicas lost, by how."""
        self.misroutes = 0
        """Requests whose replica had lost the adapter that it was chosen for."""
        self.route_seconds: list[float] = []
        """What routing took since it was last asked for."""
        self.on_join: Callable[[Member], None] = lambda member: None
        """Told of each replica that has said hello."""
        self.door = door
        self._channels: dict[str, Channel] = {}
        self._changed = asyncio.Event()
        """Set, and replaced, whenever a replica comes or goes."""
        self._known: set[str] = set()
        """Those that Serve says there are."""
        self._max_waiting: dict[str, int] = {}
        self._waking = False
        """A call waits for a replica to be started."""
        self._tasks: set[asyncio.Task[Any]] = set()
        self._unwatch: Callable[[], None] = lambda: None
        self._loop: asyncio.AbstractEventLoop | None = None

    # Life cycle

    def start(self) -> None:
        from aioengine.fleet.door.discovery import watch_replicas

        loop = self._loop = asyncio.get_running_loop()

        def watch(ids: set[str]) -> None:
            loop.call_soon_threadsafe(self._replicas_are, ids)

        self._unwatch = watch_replicas(self.config.name, watch)
        self._spawn(self._watch())

    async def complete(self, within: float) -> None:
        """Wait until as many replicas as are configured have said hello; where their number changes, until
        one has. Raises EngineStopped."""
        wanted = self.config.replicas if self.config.autoscale is None else 1
        try:
            async with asyncio.timeout(within):
                # The first call makes Serve's router, which then says which replicas there are.
                await self.handle.options(method_name="describe").remote()
                while len(self.members) < wanted:
                    await self._change()
        except TimeoutError:
            raise EngineStopped(
                f"{len(self.members)} of {wanted} replicas were heard of within {within:g} s"
            ) from None

    async def stop(self, error: AioEngineError) -> None:
        self._unwatch()
        for task in self._tasks:
            task.cancel()
        channels = list(self._channels.values())
        for channel in channels:
            for call in channel.calls.values():
                call.fail(error)
            channel.close()
        for channel in channels:
            await channel.ended()
        if self._tasks:
            await asyncio.wait(self._tasks)

    @property
    def asleep(self) -> bool:
        """There is no replica because nothing is asked of the fleet; the next request wakes it."""
        return self.config.autoscale is not None and not self._known

    @property
    def missing(self) -> int:
        """Replicas that there should be, and that are not heard of."""
        wanted = self.config.replicas if self.config.autoscale is None else len(self._known)
        return max(wanted - len(self.members), 0)

    # Requests

    async def place(self, call: Call) -> None:
        """Send it to a replica; wait for one if there is none. Raises EngineOverloaded if the router rejects
        it, EngineStopped if no replica comes, DeadlineExceeded."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self.config.replica_wait_seconds
        while not call.ended:
            request = self._route_request(call)
            began = time.perf_counter()
            route = self.guard.route(request, self.state.view)
            if len(self.route_seconds) < 100_000:
                self.route_seconds.append(time.perf_counter() - began)
            if route.replicas:
                self._send(call, request, route.replicas[0])
                return
            if any(view.replica_id not in call.tried for view in self.state.view.accepting):
                raise EngineOverloaded(f"the router rejects the request: {route.reject}", bound="server")
            if call.tried and self.state.view.accepting:
                call.tried = (
                    frozenset()
                )  # all have been lost or refused once; those that live may be asked again
                if not call.begun:
                    await asyncio.sleep(0.05)
                continue
            now = loop.time()
            due = until if call.deadline is None else min(until, call.deadline)
            if now >= due:
                if call.deadline is not None and now >= call.deadline:
                    raise DeadlineExceeded(
                        f"request {call.request_id!r}: its deadline passed before a replica came"
                    )
                raise EngineStopped("no replica of the fleet takes requests now; try again later")
            if self.asleep and not self._waking:
                self._waking = True
                self._spawn(self._wake())
            try:
                async with asyncio.timeout(due - now):
                    await self._change()
            except TimeoutError:
                pass

    def abandon(self, call: Call) -> None:
        """Nobody waits for it any more: if it runs, it is aborted."""
        if call.replica is None:
            return
        channel = self._channels.get(call.replica)
        self.state.ended(str(call.key))
        call.replica = None
        if channel is not None and channel.calls.pop(call.key, None) is not None:
            channel.send(Abort(call.key))
            self._close_if_left(channel)

    async def _wake(self) -> None:
        """A call that waits for a replica: Serve starts one for it."""
        try:
            async with asyncio.timeout(self.config.replica_wait_seconds):
                await self.handle.options(method_name="describe").remote()
        except Exception as error:
            logger.warning("no replica has come: %s", type(error).__name__)
        finally:
            self._waking = False

    def limit_waiting(self, max_waiting: Mapping[str, int]) -> None:
        self._max_waiting = dict(max_waiting)
        self._share_limits(list(self._channels.values()))

    def _share_limits(self, channels: list[Channel]) -> None:
        """Each replica gets its share of the bounds, rounded up."""
        share = self.config.replicas if self.config.autoscale is None else max(len(self.members), 1)
        limits = {tenant: -(-limit // share) for tenant, limit in self._max_waiting.items()}
        for channel in channels:
            channel.send(LimitWaiting(limits))

    def _route_request(self, call: Call) -> RouteRequest:
        if call.route is None or call.route.tried != call.tried:
            options = call.options
            call.route = RouteRequest(
                str(call.key),
                options.adapter,
                len(call.prompt) + len(call.tokens),
                max(call.params.max_tokens - len(call.tokens), 0),
                options.expected_tokens,
                options.tenant,
                options.priority,
                None if call.deadline is None else time.monotonic() + call.deadline - self._now(),
                prefix_hashes(call.prompt, options.adapter, salt=options.cache_salt),
                tried=call.tried,
            )
        return call.route

    def _send(self, call: Call, request: RouteRequest, replica: str) -> None:
        channel = self._channels[replica]
        options = call.options
        left = None if call.deadline is None else max(call.deadline - self._now(), 1e-3)
        resumed = call.begun
        constraint = call.params.constraint
        adapter = options.adapter
        where = None if adapter is None else self.state.view.replicas[replica].location(adapter)
        order = Submit(
            call.key,
            call.request_id,
            call.prompt,
            pack_params(call.params),
            msgspec.structs.replace(
                options,
                deadline=left,
                output=tuple(call.tokens),
                replay=options.replay or (resumed and self.config.replays),
            ),
            constraint.text if isinstance(constraint, SentGrammar) else None,
            {} if call.spans is None else call.spans.sent(replica, len(call.tokens)),
            where in (Location.SLOT, Location.CPU),
        )
        self.state.sent(request, replica)
        call.replica = replica
        channel.calls[call.key] = call
        channel.send(order)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    # What replicas say

    def _replicas_are(self, ids: set[str]) -> None:
        self._known = ids
        for replica in ids - self._channels.keys():
            self._open(replica)
        for replica in self._channels.keys() - ids:
            channel = self._channels[replica]
            channel.leaving = True
            if replica in self.members:
                self.state.drain(replica)
            self._close_if_left(channel)

    def _open(self, replica: str) -> None:
        self._channels[replica] = Channel(
            self.handle, replica, self.door, frame=self._take, lost=self._channel_lost
        )

    def _take(self, channel: Channel, frame: Frame) -> None:
        now = self._now()
        if frame.hello is not None:
            self._hello(channel, frame.hello)
        for delta in frame.deltas:
            call = channel.calls.get(delta.key)
            if call is not None:
                self._delta(channel, call, delta, now)
        member = self.members.get(channel.replica)
        if member is not None and frame.status is not None:
            self._report(member, frame.status, frame.residency)

    def _hello(self, channel: Channel, hello: Hello) -> None:
        self.members[channel.replica] = Member(channel, hello)
        limits = ReplicaLimits(hello.slots, hello.cpu_loras, hello.max_running, hello.kv_tokens)
        self.state.join(channel.replica, limits)
        if self._max_waiting:
            fixed = self.config.autoscale is None
            self._share_limits([channel] if fixed else [m.channel for m in self.members.values()])
        logger.info("replica %s is there (process %d on %s)", channel.replica, hello.pid, hello.node)
        self.on_join(self.members[channel.replica])
        self._tell_change()

    def _report(self, member: Member, status: Status, residency: Residency | None) -> None:
        member.status = status
        tiers = None
        if residency is not None:
            member.residency = residency
            held: dict[str, list[str]] = {"slot": [], "cpu": [], "loading": [], "disk": []}
            for info in residency.adapters:
                held[info.location].append(info.name)
            tiers = Tiers(held["slot"], held["cpu"], held["loading"])
        replica = member.channel.replica
        hung = status.step_age > self.config.step_seconds
        if hung or status.state == "dead":
            self._lose(member.channel, "hung" if hung else "dead", "its engine does not go on")
            return
        was = self.state.view.replicas[replica].accepting
        self.state.drain(replica, status.draining or member.channel.leaving or not member.ready)
        self.state.report(
            replica,
            Report(
                status.sent_at,
                status.received,
                status.ended,
                status.waiting,
                status.running,
                status.waiting_tokens,
                status.running_tokens,
                status.free_kv_tokens,
                dict(status.waiting_for),
                status.load_seconds,
                status.slot_seconds,
                status.seconds_per_token,
                status.service_seconds,
                tiers,
            ),
        )
        if self.state.view.replicas[replica].accepting and not was:
            self._tell_change()

    def _delta(self, channel: Channel, call: Call, delta: Delta, now: float) -> None:
        begun = call.begun
        self.misroutes += delta.misrouted
        if delta.error:
            error = unpack_error(delta.error)
            elsewhere = isinstance(error, (EngineStopped, EngineDead)) or (
                isinstance(error, EngineOverloaded) and not begun and error.bound != "tenant"
            )
            if elsewhere and self._others(call):
                del channel.calls[call.key]
                self.state.failed(str(call.key))
                self._again(call, channel.replica, "refused")
                return
        call.take(delta, now)
        if call.begun and not begun:
            self.state.started(str(call.key))
        if call.ended:
            del channel.calls[call.key]
            call.replica = None
            self.state.ended(str(call.key))
            self._close_if_left(channel)

    def _others(self, call: Call) -> bool:
        """Whether a replica has not been asked yet."""
        tried = {*call.tried, call.replica}
        return any(view.replica_id not in tried for view in self.state.view.accepting)

    # Losses

    def _channel_lost(self, channel: Channel, why: str) -> None:
        self._lose(channel, "lost", why)

    def _lose(self, channel: Channel, how: str, why: str) -> None:
        """The replica is lost to this door: its requests go on elsewhere."""
        replica = channel.replica
        if self._channels.get(replica) is not channel:
            return
        del self._channels[replica]
        self.members.pop(replica, None)
        self.state.leave(replica)
        channel.close()
        calls, channel.calls = channel.calls, {}
        if not channel.leaving or calls:
            self.losses[how] += 1
            logger.warning("replica %s is %s (%s); %d requests go elsewhere", replica, how, why, len(calls))
        for call in calls.values():
            self._again(call, replica, how)
        self._spawn(self._reopen(replica))
        self._tell_change()

    def _again(self, call: Call, replica: str, how: str) -> None:
        """Have it go on at another replica, or fail."""
        call.replica = None
        if call.spans is not None:
            call.spans.lost(how)
        call.tried = call.tried | {replica}
        if call.begun:
            call.migrations += 1
            self.migrations[how] += 1
            if call.migrations > self.config.migration_limit:
                call.fail(
                    EngineDead(
                        f"request {call.request_id!r} lost its replica {call.migrations} times and is "
                        f"given up (migration_limit={self.config.migration_limit})"
                    )
                )
                return
        elif len(call.tried) > MAX_TRIES:
            call.fail(EngineDead(f"request {call.request_id!r} lost {len(call.tried)} replicas at once"))
            return
        self._spawn(self._replace(call))

    async def _replace(self, call: Call) -> None:
        try:
            await self.place(call)
        except AioEngineError as error:
            call.fail(error)

    async def _reopen(self, replica: str) -> None:
        """If Serve keeps the replica, it may only have been cut off, or stood still: try it now and then."""
        while True:
            await asyncio.sleep(1.0)
            if replica not in self._known or replica in self._channels:
                return
            self._open(replica)
            return

    async def _watch(self) -> None:
        """See who is silent."""
        loop = asyncio.get_running_loop()
        last = loop.time()
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            now = loop.time()
            late = now - last - WATCH_SECONDS
            last = now
            if late > 1.0:  # this process stood still: nothing is known of the others
                for channel in self._channels.values():
                    channel.heard += late
            self.state.check()
            for channel in list(self._channels.values()):
                if channel.replica in self.members and now - channel.heard > self.config.silent_seconds:
                    self._lose(channel, "silent", f"not heard of for {now - channel.heard:.1f} s")

    def _close_if_left(self, channel: Channel) -> None:
        """Serve waits for the channel before it ends a replica that it has taken out."""
        if channel.leaving and not channel.calls and self._channels.get(channel.replica) is channel:
            del self._channels[channel.replica]
            self.members.pop(channel.replica, None)
            self.state.leave(channel.replica)
            channel.close()
            self._tell_change()

    def _tell_change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _change(self) -> None:
        await self._changed.wait()

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _router_failed(self, kind: str, text: str) -> None:
        logger.warning("router: %s", text)

    # Watching

    def stats(self) -> EngineStats:
        """Sums over the replicas; totals since their start are their own metrics' business."""
        slots: list[SlotInfo] = []
        for member in self.members.values():
            replica = member.channel.replica
            slots += [msgspec.structs.replace(slot, replica=replica) for slot in member.residency.slots]
        statuses = [m.status for m in self.members.values() if m.status is not None]
        hellos = [m.hello for m in self.members.values()]
        block = self.config.engine.block_size
        counted = dict.fromkeys(
            name for name in EngineStats.__struct_fields__ if name not in ("slots", "block_size")
        )
        values: dict[str, int] = dict.fromkeys(counted, 0)
        values |= {
            "cpu_adapters": sum(len(m.residency.adapters) for m in self.members.values()),
            "cpu_capacity": sum(hello.cpu_loras for hello in hellos),
            "adapters": len({a.name for m in self.members.values() for a in m.residency.adapters}),
            "running": sum(status.running for status in statuses),
            "waiting": sum(status.waiting for status in statuses),
            "kv_blocks": sum(hello.kv_tokens for hello in hellos) // block,
            "kv_blocks_free": sum(status.free_kv_tokens for status in statuses) // block,
        }
        return EngineStats(slots=tuple(slots), block_size=block, **values)
