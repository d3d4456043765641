"""Sends requests to replicas, and to other replicas when theirs are lost."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Set

import msgspec

from aioengine import errors
from aioengine.checks import error_text
from aioengine.executors.process.wire import unpack_error
from aioengine.fleet.gateway.call import Call
from aioengine.fleet.gateway.channel import Channel
from aioengine.fleet.gateway.grammars import SentGrammar
from aioengine.fleet.gateway.members import Member, Members
from aioengine.fleet.wire import Abort, Delta, LimitWaiting, Submit, gone
from aioengine.info import without_versions
from aioengine.request import pack_params
from aioengine.schedulers.policy import Location
from aioengine.schedulers.routing import Route, RouteRequest, RouterGuard, load_router, prefix_hashes

logger = logging.getLogger("aioengine.fleet")

MAX_TRIES = 16
"""Maximum number of replicas that a request is offered to before it has begun."""


class Dispatcher:
    """Asks the router where each request should go. All methods are called on one loop. ``timer`` and
    ``processor`` measure the router's decisions."""

    def __init__(
        self,
        members: Members,
        *,
        timer: Callable[[], float] = time.perf_counter,
        processor: Callable[[], float] = time.thread_time,
    ) -> None:
        self._members = members
        self._config = members.config
        self._state = members.state
        self._timer = timer
        self.digest_of: Callable[[str], str] = lambda name: ""
        """Function that returns the digest of the current version's content; "" if it is not known."""
        self.guard = RouterGuard(
            load_router(self._config.router),
            timer=timer,
            processor=processor,
            failed=self._router_failed,
        )
        self.migrations: Counter[str] = Counter()
        """Requests that continued on another replica, by the fate of their first one."""
        self.misroutes = 0
        """Requests whose replica had lost the adapter that it was chosen for."""
        self.on_route: Callable[[float, Route], None] = lambda seconds, route: None
        """Callback for each routing decision, and its seconds."""
        self.waiting = 0
        """Calls that wait, because there is no replica for them."""
        self._max_waiting: dict[str, int] = {}
        members.on_join.append(self._joined)
        members.on_delta = self._take
        members.on_loss = self._again

    async def place(self, call: Call) -> None:
        """Send a call to a replica; wait for one if there is none. Raises EngineOverloaded if the router
        rejects it, EngineStopped if no replica comes, DeadlineExceeded."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self._config.replica_wait_seconds
        anywhere = False
        while not call.ended:
            tried = call.tried | self._without_contents(call)
            if call.begun and (anywhere or not self._accepting(tried)):
                tried = call.tried  # those that have not read its content may find the same
            request = self._route_request(call, tried)
            began = self._timer()
            route = self.guard.route(request, self._state.view)
            self.on_route(self._timer() - began, route)
            if route.replicas:
                self._send(call, request, route.replicas[0])
                return
            if call.begun and tried != call.tried:
                anywhere = True
                continue
            if self._accepting(tried):
                raise errors.EngineOverloaded(
                    f"the router rejects the request: {route.reject}", bound="server"
                )
            self._check_versions(call)
            if call.tried and self._state.view.accepting:
                # All replicas were lost or refused once; the live ones may be asked again.
                call.tried = frozenset()
                if not call.begun:
                    await asyncio.sleep(0.05)
                continue
            now = loop.time()
            due = until if call.deadline is None else min(until, call.deadline)
            if now >= due:
                if call.deadline is not None and now >= call.deadline:
                    named = "" if call.wanted is None else f" for adapter {call.wanted!r} (on no replica)"
                    raise errors.DeadlineExceeded(
                        f"request {call.request_id!r}{named}: its deadline passed before a replica was "
                        "available"
                    )
                raise errors.EngineStopped("no replica of the fleet takes requests now; try again later")
            self._members.wake()
            self.waiting += 1
            try:
                async with asyncio.timeout(due - now) as call.wait:
                    await self._members.change()
            except TimeoutError:
                pass
            finally:
                call.wait = None
                self.waiting -= 1

    def abandon(self, call: Call) -> None:
        """Give up a call that nobody waits for any more; if it runs, it is aborted. If it is on its way to
        another replica, it is not sent."""
        call.end()
        if call.replica is None:
            return
        channel = self._members.channel(call.replica)
        self._state.ended(str(call.key))
        call.replica = None
        if channel is not None and channel.calls.pop(call.key, None) is not None:
            channel.send(Abort(call.key))
            self._members.close_if_left(channel)

    def limit_waiting(self, max_waiting: Mapping[str, int]) -> None:
        self._max_waiting = dict(max_waiting)
        self._share_limits()

    def _joined(self, member: Member) -> None:
        if self._max_waiting:
            self._share_limits()

    def _share_limits(self) -> None:
        """Send each replica its share of the bounds, rounded up."""
        share = max(self._members.wanted, 1)
        limits = {tenant: -(-limit // share) for tenant, limit in self._max_waiting.items()}
        for member in self._members.members.values():
            member.channel.send(LimitWaiting(limits))

    def _route_request(self, call: Call, tried: frozenset[str]) -> RouteRequest:
        if call.route is None or call.route.tried != tried:
            options, content = call.options, self._content(call)
            caching = self._config.engine.enable_prefix_caching
            call.route = RouteRequest(
                str(call.key),
                call.adapter,
                len(call.prompt) + len(call.tokens),
                max(call.params.max_tokens - len(call.tokens), 0),
                options.expected_tokens,
                options.tenant,
                options.priority,
                None if call.deadline is None else self._members.clock() + call.deadline - _now(),
                prefix_hashes(call.prompt, content, salt=options.cache_salt) if caching else (),
                tried=tried,
            )
        return call.route

    # Contents of adapters

    def _needed(self, call: Call) -> Mapping[str, str]:
        """Return the digests of what a call needs and only some replicas have, by version: what it has begun
        with or, before, what it names and new requests do not get any more."""
        if call.begun:
            return {call.adapter: call.content} if call.adapter and call.content else {}
        named = call.contents.items()
        return {name: digest for name, digest in named if digest != self.digest_of(without_versions(name))}

    def _without_contents(self, call: Call) -> frozenset[str]:
        """Return the replicas that have not all that a call needs, as far as they have said."""
        needed = [(without_versions(name), digest) for name, digest in self._needed(call).items()]
        members = self._members.members.items() if needed else ()
        return frozenset(name for name, member in members if not all(member.has(*one) for one in needed))

    def _content(self, call: Call) -> str | None:
        """Return a name for what a call's adapter holds, because other contents cache other keys and
        values."""
        if call.options.mix is not None or call.adapter is None:
            return call.wanted
        return call.content or self.digest_of(call.adapter) or call.adapter

    def _accepting(self, tried: Set[str | None]) -> bool:
        """Whether a replica takes new requests that is none of these."""
        return any(view.replica_id not in tried for view in self._state.view.accepting)

    def _check_versions(self, call: Call) -> None:
        """Raise AdapterNotFound if all replicas that have the replaced versions which a call names will take
        no new requests."""
        needed, members = self._needed(call), self._members.members
        having = members.keys() - self._without_contents(call)
        if needed and not call.begun and all(members[replica].leaves for replica in having):
            raise gone(next(iter(needed)))

    def _send(self, call: Call, request: RouteRequest, replica: str) -> None:
        channel = self._members.channel(replica)
        assert channel is not None, "the router is told of a loss before it is asked again"
        options = call.options
        left = None if call.deadline is None else max(call.deadline - _now(), 1e-3)
        resumed = call.begun
        constraint = call.params.constraint
        adapter = call.adapter
        where = None if adapter is None else self._state.view.replicas[replica].location(adapter)
        order = Submit(
            call.key,
            call.request_id,
            call.prompt,
            pack_params(call.params),
            msgspec.structs.replace(
                options,
                deadline=left,
                output=tuple(call.tokens),
                replay=options.replay or (resumed and self._config.replays),
            ),
            constraint.text if isinstance(constraint, SentGrammar) else None,
            {} if call.spans is None else call.spans.sent(replica, len(call.tokens)),
            where in (Location.SLOT, Location.CPU),
            [call.contents.get(name, "") for name in options.named],
            call.content,
        )
        try:
            channel.send(order)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise errors.RequestInvalid(
                f"request {call.request_id!r} cannot be sent to a replica: {error_text(error)}"
            ) from error
        self._state.sent(request, replica)
        call.replica = replica
        channel.calls[call.key] = call

    def _take(self, channel: Channel, call: Call, delta: Delta, now: float) -> None:
        """Take in a replica's report on a request, which came at ``now``."""
        begun = call.begun
        if delta.misrouted:  # there is nothing else in it
            self.misroutes += 1
            return
        error = unpack_error(delta.error) if delta.error else None
        if error is not None:
            assert isinstance(error, errors.AioEngineError)
            if isinstance(error, errors.AdapterChanged):
                self._members.on_changed(channel.replica, error.name)
            if begun and isinstance(error, errors.AdapterNotFound):
                error = _changed(error.name)
            elsewhere = isinstance(
                error, (errors.EngineStopped, errors.EngineDead, errors.AdapterChanged)
            ) or (isinstance(error, errors.EngineOverloaded) and not begun and error.bound != "tenant")
            if elsewhere and self._others(call):
                del channel.calls[call.key]
                self._state.ended(str(call.key))
                self._again(
                    call, channel.replica, "dead" if isinstance(error, errors.EngineDead) else "refused"
                )
                return
            call.fail(error)
        call.take(delta, now)
        call.content = delta.content or call.content
        if call.ended:
            del channel.calls[call.key]
            call.replica = None
            self._state.ended(str(call.key))
            self._members.close_if_left(channel)

    def _others(self, call: Call) -> bool:
        """Whether a replica that can run the call has not been asked yet."""
        unable = frozenset[str]() if call.begun else self._without_contents(call)
        return self._accepting({*call.tried, call.replica, *unable})

    def _again(self, call: Call, replica: str, how: str) -> None:
        """Continue the call on another replica, or fail it."""
        call.replica = None
        if call.spans is not None:
            call.spans.lost(how)
        call.tried = call.tried | {replica}
        if not call.begun:  # what its replica has said is not binding yet
            call.content = call.asked_content
        if call.begun:
            call.migrations += how != "refused"
            self.migrations[how] += 1
            if call.migrations > self._config.migration_limit:
                call.fail(
                    errors.EngineDead(
                        f"request {call.request_id!r} lost its replica {call.migrations} times and is "
                        f"given up (migration_limit={self._config.migration_limit})"
                    )
                )
                return
        elif len(call.tried) > MAX_TRIES:
            call.fail(
                errors.EngineDead(f"request {call.request_id!r} lost {len(call.tried)} replicas at once")
            )
            return
        self._members.background.spawn(self._replace(call))

    async def _replace(self, call: Call) -> None:
        try:
            await self.place(call)
        except errors.AioEngineError as error:
            call.fail(error)

    def _router_failed(self, kind: str, text: str) -> None:
        logger.warning("router: %s", text)


def _changed(version: str) -> errors.AdapterChanged:
    why = (
        "it was replaced, changed or unloaded while the request ran, and no other replica has the content "
        "that the request began with; repeat the request"
    )
    return errors.AdapterChanged(why, name=without_versions(version), transient=True)


def _now() -> float:
    return asyncio.get_running_loop().time()
