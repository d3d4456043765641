"""Requests that have begun keep the content that they began with, whatever happens to replicas and
gateways."""

from __future__ import annotations

import asyncio
from typing import Any, NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.adapter_infos import adapter_info
from support.small_fleet import join

from aioengine import EngineConfig, SamplingParams
from aioengine.errors import AdapterChanged, AioEngineError
from aioengine.executors.process.wire import pack_error
from aioengine.fleet.config import FleetConfig
from aioengine.fleet.gateway.call import Call
from aioengine.fleet.gateway.dispatcher import Dispatcher
from aioengine.fleet.gateway.members import Members
from aioengine.fleet.wire import Delta, Frame, Residency, Status, Submit, gone
from aioengine.lab.simulation.clock import run_in_virtual_time
from aioengine.request import RequestOptions
from aioengine.schedulers.routing import Report

pytest.importorskip("ray.serve", reason="Ray has no wheel for this system or Python")

NAMES = ("a", "b")
"""Adapters that were loaded through the fleet; "u" is found by its name, and so it has no numbers."""
REPLICAS = 4
STATUS = Status(Report(0.0, 1, 0, 0, 1, 0, 100, {}), 0.0, False, "running")


def content_of(version: str) -> str:
    """Return what is in a version: some were replaced by the same."""
    name, _, number = version.partition("@")
    return f"{name}{number if name == 'u' else int(number) // 2}"


class Replica:
    """A replica that makes tokens of the content that a request runs on. It sends them when it is told to."""

    def __init__(self, name: str, held: dict[str, list[int]]) -> None:
        self.name = name
        self.held = held
        """By adapter: its versions; the last one is the current one."""
        self.running: list[str] = []
        self.first = True
        self.error: AioEngineError | None = None
        self.order: Submit | None = None

    def take(self, order: Any) -> None:
        assert isinstance(order, Submit)
        self.order, self.first, self.running = order, True, []
        options = order.options
        contents = [order.content] if order.content and len(options.named) == 1 else order.contents
        for wanted, digest in zip(options.named, contents, strict=True):
            name = str(wanted).partition("@")[0]
            there = [f"{name}@{version}" for version in reversed(self.held[name])]
            fits = [version for version in there if digest in ("", content_of(version))]
            if not fits:
                self.error = gone(str(wanted))
            self.running.append((fits or there)[0])
        if order.content not in ("", self.content):
            self.error = gone(str(options.adapter))

    @property
    def content(self) -> str:
        return " ".join(map(content_of, self.running))

    def delta(self) -> Delta:
        assert self.order is not None
        if self.error is not None:
            return Delta(self.order.key, error=pack_error(self.error))
        first, self.first = self.first, False
        token = int.from_bytes(" ".join(sorted(set(self.content.split()))).encode())
        if not first:
            return Delta(self.order.key, [token])
        return Delta(self.order.key, [token], content=self.content)

    def replace(self, name: str, *, keep: bool) -> None:
        """Have the next version; ``keep``: other requests still need the one before."""
        before = self.held[name]
        needed = [v for v in before if f"{name}@{v}" in self.running or keep]
        self.held[name] = [*needed, before[-1] + 1]

    def residency(self) -> Residency:
        infos = {
            name: [adapter_info(name, version=v, digest=content_of(f"{name}@{v}")) for v in versions]
            for name, versions in self.held.items()
        }
        replaced = [info for held in infos.values() for info in held[:-1]]
        return Residency([], [held[-1] for held in infos.values()], replaced)


class Event(NamedTuple):
    kind: str
    """What happens: "token", "replace" (on one replica), "hear" (a replica says what it has; with "token", in
    one frame), "known" (the gateway hears of the newest versions), or "lose" (the replica that runs it)."""
    replica: int = 0
    adapter: str = "a"
    keep: bool = False


EVENTS = st.builds(
    Event,
    st.sampled_from(["token", "replace", "replace", "hear", "token hear", "known", "lose", "lose"]),
    st.integers(0, REPLICAS - 1),
    st.sampled_from([*NAMES, "u"]),
    st.booleans(),
)
MIXES = [{"a": 0.5, "b": 0.5}, {"a": 0.5, "a@1": 0.5}, {"a": 0.5, "u": 0.5}]
WANTED = st.sampled_from([{"a": 1.0}, {"a@1": 1.0}, {"u": 1.0}, {"a": 0.5}, {"u": 0.5}, *MIXES])
EVERYWHERE = [Event("replace", number) for number in range(REPLICAS)]
HEARD = [Event("hear", number) for number in range(REPLICAS)]


class Fleet:
    def __init__(self) -> None:
        self.members = Members(FleetConfig(engine=EngineConfig(model="tiny")), None, gateway="gateway")
        self.replicas: dict[str, Replica] = {}
        self.channels: dict[str, Any] = {}
        self.known = dict.fromkeys(NAMES, 1)
        for number in range(REPLICAS):
            replica = Replica(f"r{number}", {name: [1] for name in (*NAMES, "u")})
            self.replicas[replica.name] = replica
            channel = self.channels[replica.name] = join(self.members, replica.name)
            channel.send = replica.take
            self.members.members[replica.name].residency = replica.residency()
        self.dispatcher = Dispatcher(self.members)
        self.dispatcher.digest_of = lambda name: (
            content_of(f"{name}@{self.known[name]}") if name in self.known else ""
        )

    def say(self, replica: Replica, *deltas: Delta, hear: bool = False) -> None:
        frame = Frame(list(deltas), *((STATUS, replica.residency()) if hear else ()))
        self.members._take(self.channels[replica.name], frame)

    async def happen(self, event: Event, call: Call) -> None:
        runs = self.replicas.get(call.replica or "")
        replica = self.replicas.get(f"r{event.replica}")
        if event.kind.startswith("token") and runs is not None:
            self.say(runs, runs.delta(), hear="hear" in event.kind)
        elif event.kind == "hear" and replica is not None:
            self.say(replica, hear=True)
        elif event.kind == "replace" and replica is not None:
            replica.replace(event.adapter, keep=event.keep)
        elif event.kind == "known":
            for name in NAMES:
                newest = max((r.held[name][-1] for r in self.replicas.values()), default=1)
                self.known[name] = max(self.known[name], newest)
        elif event.kind == "lose" and runs is not None and len(self.replicas) > 1:
            del self.replicas[runs.name], self.members._channels[runs.name], self.members.members[runs.name]
            self.members.state.leave(runs.name)
            self.members.on_loss(call, runs.name, "lost")
        while self.members.background.tasks and not call.ended:
            await asyncio.gather(*self.members.background.tasks)
            await asyncio.sleep(0)

    def can_go_on(self, call: Call) -> bool:
        """Whether every replica that is left has all that the call has begun with, and has said so. What has
        no number must, in a mix, be what is there now."""
        began = list(zip(call.options.mix or [call.adapter], call.content.split(), strict=True))

        def has(replica: Replica, wanted: str, content: str) -> bool:
            name, _, number = wanted.partition("@")
            versions = replica.held[name][-1:] if call.options.mix and not number else replica.held[name]
            return content in (content_of(f"{name}@{version}") for version in versions)

        return all(
            all(has(replica, str(wanted), content) for wanted, content in began)
            and _names(self.members.members[name].residency) == _names(replica.residency())
            for name, replica in self.replicas.items()
        )


def _names(residency: Residency) -> set[str]:
    return {f"{info.name}@{info.version}" for info in residency.versions}


@pytest.mark.slow
@settings(deadline=None, max_examples=100)
@given(WANTED, st.lists(EVENTS, min_size=3, max_size=14))
@example({"a": 1.0}, [Event("token"), Event("lose"), Event("token")])
@example({"a": 0.5}, [Event("token"), *EVERYWHERE, Event("known"), Event("lose"), Event("token")])
@example({"a": 1.0}, [Event("token"), *EVERYWHERE, *HEARD, Event("lose"), Event("token"), Event("token")])
@example({"a": 1.0}, [*EVERYWHERE, Event("token"), *HEARD, Event("known"), Event("lose"), Event("token")])
@example({"u": 1.0}, [Event("token"), Event("replace", 1, "u"), *[Event("lose"), Event("token")] * 3])
def test_tokens_are_all_of_the_content_that_made_the_first(
    wanted: dict[str, float], events: list[Event]
) -> None:
    """A request goes on with that, or fails: it fails only if a replica has not all of it, or has not said
    so. Versions change on one replica after the other, and the gateway may know of none of it."""

    async def main() -> None:
        fleet = Fleet()
        contents = {name: content_of(name) for name in wanted if "@" in name}
        options = RequestOptions(adapter=wanted)
        call = Call(1, "r", [5, 6], SamplingParams(seed=1), options, 0.0, contents)
        await fleet.dispatcher.place(call)
        for event in events:
            before = call.tokens[:1] and fleet.can_go_on(call)
            await fleet.happen(event, call)
            assert len(set(call.tokens)) <= 1
            if call.ended and call.tokens:
                with pytest.raises(AdapterChanged, match="repeat"):
                    await call.next()
                assert not before
            if call.ended:
                return

    run_in_virtual_time(main())
