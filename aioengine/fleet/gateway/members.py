"""The replicas as a gateway knows them: their ids, their states, and their losses."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from aioengine.errors import AioEngineError, EngineStopped
from aioengine.fleet.config import FleetConfig
from aioengine.fleet.gateway.call import Call
from aioengine.fleet.gateway.channel import Channel
from aioengine.fleet.wire import Delta, Frame, Hello, Residency, Status
from aioengine.schedulers.routing import FleetState, ReplicaLimits
from aioengine.tasks import Background

logger = logging.getLogger("aioengine.fleet")

LOOK_SECONDS = 0.25
"""Seconds between two looks for replicas that do not report."""
ARRIVE_SECONDS = 10.0
"""How long orders may be on their way to a replica that reports: they go by other calls."""
REOPEN_SECONDS = 1.0
"""Seconds until a lost replica is tried again."""


class Member:
    """A replica that has reported."""

    def __init__(self, channel: Channel, hello: Hello) -> None:
        self.channel = channel
        self.hello = hello
        self.status: Status | None = None
        self.residency = Residency([], [])
        self.ready = True
        """Whether the replica knows the fleet's adapters."""

    @property
    def leaves(self) -> bool:
        """Whether it takes no new requests, because it is drained or about to go."""
        return self.channel.leaving or (self.status is not None and self.status.draining)

    def has(self, adapter: str, digest: str) -> bool:
        """Whether it has this content of an adapter in memory, or where requests still need it, although it
        was replaced."""
        return any((info.name, info.digest) == (adapter, digest) for info in self.residency.versions)

    @property
    def gets_none(self) -> bool:
        """Whether it gets no requests now, because it leaves or does not know the fleet's adapters yet."""
        return self.leaves or not self.ready


class Members:
    """The replicas of a fleet. All methods are called on one loop. ``gateway``: this one's name among others;
    ``clock``: what the loop's times are of."""

    def __init__(
        self, config: FleetConfig, handle: Any, *, gateway: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.config = config
        self.handle = handle
        self.clock = clock
        self.state = FleetState(clock, silent_after=config.silent_seconds)
        self.members: dict[str, Member] = {}
        self.losses: Counter[str] = Counter()
        """Number of lost replicas, by how they were lost: "lost", "silent", "hung" or "dead"."""
        self.conflicts = 0
        """Number of adapters that were found with different content on two replicas."""
        self.on_join: list[Callable[[Member], None]] = []
        """Callbacks for each replica that has said hello."""
        self.on_residency: list[Callable[[Member, Residency], None]] = []
        """Callbacks for each replica whose adapters in memory have changed, with those before."""
        self.on_changed: Callable[[str, str], None] = lambda replica, adapter: None
        """Callback for an adapter whose files a replica has found to be others than it should have."""
        self.on_delta: Callable[[Channel, Call, Delta, float], None] = lambda channel, call, delta, now: None
        """Callback for a replica's report on a request, and the time at which it came."""
        self.on_loss: Callable[[Call, str, str], None] = lambda call, replica, how: None
        """Callback for each request whose replica is lost."""
        self.gateway = gateway
        self._least = config.bounds[0]
        self._channels: dict[str, Channel] = {}
        self._changed = asyncio.Event()
        """Set and replaced whenever a replica appears or disappears."""
        self._known: set[str] = set()
        """Replicas that exist, as Serve reports them."""
        self._waking = False
        """Whether a call waits for the start of a replica."""
        self.background = Background()
        """Until :meth:`stop`."""
        self._unwatch: Callable[[], None] = lambda: None
        self._loop: asyncio.AbstractEventLoop | None = None

    # Life cycle

    def start(self, watch_replicas: Callable[..., Callable[[], None]] | None = None) -> None:
        """Begin to look after the replicas that Serve reports, or ``watch_replicas`` in its place."""
        if watch_replicas is None:
            from aioengine.fleet.gateway import discovery

            watch_replicas = discovery.watch_replicas

        loop = self._loop = asyncio.get_running_loop()

        def watch(ids: set[str]) -> None:
            loop.call_soon_threadsafe(self._replicas_are, ids)

        self._unwatch = watch_replicas(self.config.name, watch)
        self.background.spawn(self._watch())

    async def complete(self, within: float | None) -> None:
        """Wait until all configured replicas may get requests or, where their number changes, until one may.
        Raises EngineStopped if that takes longer than ``within`` seconds."""
        wanted = self.config.replicas if self.config.autoscale is None else 1
        try:
            async with asyncio.timeout(within):
                # The first call makes Serve's router, which then reports the ids of the replicas.
                await self.handle.options(method_name="describe").remote()
                while len(self.members) < wanted:
                    await self.change()
        except TimeoutError:
            raise EngineStopped(
                f"{len(self.members)} of {wanted} replicas have reported within {within:g} s"
            ) from None

    async def stop(self, error: AioEngineError) -> None:
        self._unwatch()
        await self.background.end()
        channels = list(self._channels.values())
        for channel in channels:
            for call in channel.calls.values():
                call.fail(error)
            channel.close()
        for channel in channels:
            await channel.ended()

    @property
    def asleep(self) -> bool:
        """Whether there is no replica because there are no requests; the next request starts one."""
        return self._least == 0 and not self._known

    @property
    def wanted(self) -> int:
        """Number of replicas that should exist: where it changes, those that Serve lists, and the least."""
        return self.config.replicas if self.config.autoscale is None else max(self._least, len(self._known))

    @property
    def missing(self) -> int:
        """Number of replicas that should exist and do not report."""
        return max(self.wanted - len(self.members), 0)

    # For whoever sends requests

    def channel(self, replica: str) -> Channel | None:
        """Return the channel to a replica; None if the replica is lost or has left."""
        return self._channels.get(replica)

    def wake(self) -> None:
        """Ask Serve to start a replica, if there is none because there were no requests."""
        if self.asleep and not self._waking:
            self._waking = True
            self.background.spawn(self._wake())

    async def _wake(self) -> None:
        """Make a call that waits for a replica, so that Serve starts one."""
        try:
            async with asyncio.timeout(self.config.replica_wait_seconds):
                await self.handle.options(method_name="describe").remote()
        except Exception as error:
            logger.warning("no replica has come: %s", type(error).__name__)
        finally:
            self._waking = False

    # For whoever changes adapters

    async def ask(self, member: Member, action: str, **arguments: Any) -> Any:
        """Return what ``EngineReplica.adapter`` does, with the replica's own version numbers, or the error
        that it met; None if the replica is lost: when it is back, it gets what the registry has."""
        call = self.handle.options(method_name="adapter")
        try:
            return await call.remote(action, arguments, to=member.channel.replica)
        except Exception as error:
            logger.warning("replica %s did not %s: %s", member.channel.replica, action, type(error).__name__)
            return None

    async def ask_all(self, members: Iterable[Member], action: str, **arguments: Any) -> list[Any]:
        return list(await asyncio.gather(*[self.ask(member, action, **arguments) for member in members]))

    # What replicas say

    def _replicas_are(self, ids: set[str]) -> None:
        new, self._known = ids - self._known, ids
        for replica in sorted(new - self._channels.keys()):  # lost ones are tried again in their time
            self._open(replica)
        for replica, channel in list(self._channels.items()):
            # One may come back, for example after Serve has changed its settings.
            channel.leaving = replica not in ids
            if replica in self.members:
                self.state.drain(replica, self.members[replica].gets_none)
            self.close_if_left(channel)
        self._tell_change()

    def _open(self, replica: str) -> None:
        self._channels[replica] = Channel(
            self.handle, replica, self.gateway, frame=self._take, lost=self._channel_lost
        )

    def _take(self, channel: Channel, frame: Frame) -> None:
        if frame.hello is not None:
            self._hello(channel, frame.hello)
        now = asyncio.get_running_loop().time()
        for delta in frame.deltas:
            call = channel.calls.get(delta.key)
            if call is not None:
                self.on_delta(channel, call, delta, now)
        member = self.members.get(channel.replica)
        if member is not None and frame.status is not None:
            self._report(member, frame.status, frame.residency)

    def _hello(self, channel: Channel, hello: Hello) -> None:
        member = self.members[channel.replica] = Member(channel, hello)
        limits = ReplicaLimits(hello.slots, hello.max_running, hello.kv_tokens)
        self.state.join(channel.replica, limits)
        logger.info("replica %s is there (process %d on %s)", channel.replica, hello.pid, hello.node)
        for listener in self.on_join:
            listener(member)  # which may say that it is not ready
        self.state.drain(channel.replica, member.gets_none)
        self._tell_change()

    def _report(self, member: Member, status: Status, residency: Residency | None) -> None:
        member.status = status
        if residency is not None:
            before, member.residency = member.residency, residency
            for listener in self.on_residency:
                listener(member, before)
        replica = member.channel.replica
        hung = status.step_age > self.config.step_seconds
        if hung or status.state == "dead":
            self._lose(member.channel, "hung" if hung else "dead", "its engine does not go on")
            return
        was = self.state.view.replicas[replica].accepting
        self.state.drain(replica, member.gets_none)
        tiers = None if residency is None else residency.tiers
        self.state.report(replica, status.report._replace(tiers=tiers))
        if self.state.view.replicas[replica].accepting and not was:
            self._tell_change()

    def knows_adapters(self, member: Member) -> None:
        """Let a replica that knows the fleet's adapters get requests at once, unless it is drained, and not
        only from its next report on."""
        member.ready = True
        if member.status is not None and self.members.get(member.channel.replica) is member:
            self.state.drain(member.channel.replica, member.gets_none)
            self._tell_change()

    # Losses

    def _channel_lost(self, channel: Channel, why: str) -> None:
        self._lose(channel, "lost", why)

    def _lose(self, channel: Channel, how: str, why: str) -> None:
        """Note that this gateway has lost the replica; its requests continue on others."""
        replica = channel.replica
        if self._channels.get(replica) is not channel:
            return
        del self._channels[replica]
        member = self.members.pop(replica, None)
        self.state.leave(replica)
        channel.close()
        calls, channel.calls = channel.calls, {}
        if member is None:  # no loss: Serve lists a replica for some seconds after its end
            logger.info("replica %s has not answered: %s", replica, why)
        elif not channel.leaving or calls:
            self.losses[how] += 1
            logger.warning("replica %s is %s (%s); %d requests go elsewhere", replica, how, why, len(calls))
        for call in calls.values():
            self.on_loss(call, replica, how)
        self.background.spawn(self._reopen(replica))
        self._tell_change()

    async def _reopen(self, replica: str) -> None:
        """Try a lost replica again after a pause, if Serve keeps it, because it may only have been paused."""
        await asyncio.sleep(REOPEN_SECONDS)
        if replica in self._known and replica not in self._channels:
            self._open(replica)

    async def _watch(self) -> None:
        """Look for replicas that do not report, or to which orders do not arrive."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            self.state.check()
            for channel in list(self._channels.values()):
                channel.look()
                quiet, sending = channel.quiet * LOOK_SECONDS, channel.sending * LOOK_SECONDS
                if channel.replica in self.members and quiet > self.config.silent_seconds:
                    self._lose(channel, "silent", f"no report for {quiet:.1f} s")
                elif sending >= ARRIVE_SECONDS:
                    self._lose(channel, "lost", f"nothing has arrived there for {sending:.1f} s")

    def close_if_left(self, channel: Channel) -> None:
        """Close the channel of a removed replica, because Serve waits for that before it ends the replica."""
        if channel.leaving and not channel.calls and self._channels.get(channel.replica) is channel:
            del self._channels[channel.replica]
            self.members.pop(channel.replica, None)
            self.state.leave(channel.replica)
            channel.close()
            self._tell_change()

    def _tell_change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def change(self) -> None:
        """Wait until a replica appears or disappears."""
        await self._changed.wait()
