"""Channels that break and are opened again, while what belongs to an earlier one is still on its way; in
virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from itertools import cycle
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.fleet_here import Stream, serve_names

from aioengine import EngineConfig, SamplingParams
from aioengine.errors import RequestInvalid
from aioengine.fleet.config import FleetConfig
from aioengine.fleet.gateway.call import Call
from aioengine.fleet.gateway.dispatcher import Dispatcher
from aioengine.fleet.gateway.members import Members
from aioengine.fleet.outbox import Outbox, Outboxes
from aioengine.fleet.wire import ChannelName, Delta, Frame, Hello, Status, Submit, decode_orders, encode_frame
from aioengine.lab.simulation.clock import run_in_virtual_time
from aioengine.request import RequestOptions
from aioengine.runtime.text_work import TextWork, tokenize
from aioengine.schedulers.routing import Report

TOKENS = 12
STEP_SECONDS = 0.25


class Replicas:
    """Serve's handle of replicas whose channels break at the times ``cuts``. A replica hears of that ``lag``
    seconds later. Orders take ``delays``, one after another, also those of a channel that is broken."""

    def __init__(self, cuts: list[float], lag: float, delays: list[float]) -> None:
        self._cuts = cuts
        self._lag = lag
        self._delays: Iterator[float] = cycle(delays)
        self._boxes: dict[str, Outboxes] = {}
        self.tasks: set[asyncio.Task[None]] = set()
        self.running: dict[str, int] = {}
        """Number of times that each request runs now."""
        self.refused = 0

    def options(self, method_name: str, **_: Any) -> Any:
        call = {"channel": self._channel, "submit": self._submit}.get(method_name, self._any)
        return SimpleNamespace(remote=call)

    async def _any(self) -> None:
        pass

    def _channel(self, name: ChannelName, to: str) -> Any:
        frames: asyncio.Queue[bytes] = asyncio.Queue()
        return Stream(self._read(frames, self._spawn(self._run(name, to, frames))))

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def _read(self, frames: asyncio.Queue[bytes], writer: asyncio.Task[None]) -> AsyncIterator[bytes]:
        loop = asyncio.get_running_loop()
        cut = next((cut for cut in self._cuts if cut > loop.time()), None)
        try:
            while True:
                async with asyncio.timeout_at(cut):
                    frame = await frames.get()
                yield frame
        except TimeoutError:
            raise ConnectionError("the channel is broken") from None
        finally:
            loop.call_later(self._lag, writer.cancel)

    async def _run(self, name: ChannelName, replica: str, frames: asyncio.Queue[bytes]) -> None:
        hello: Hello | None = Hello(replica, 1, "node", 1, 1, 8, 1)
        async with self._boxes.setdefault(replica, Outboxes()).opened(name) as box:
            while not box.replaced:
                now = asyncio.get_running_loop().time()
                frames.put_nowait(encode_frame(Frame(box.take(), _status(now, box), None, hello)))
                hello = None
                await box.filled(0.5)

    async def _submit(self, name: ChannelName, orders: bytes, to: str) -> None:
        await asyncio.shield(self._spawn(self._arrive(name, orders, to, next(self._delays))))

    async def _arrive(self, name: ChannelName, orders: bytes, to: str, delay: float) -> None:
        await asyncio.sleep(delay)
        try:
            box = self._boxes[to].of(name)
        except LookupError:
            self.refused += 1
            return
        for order in decode_orders(orders):
            if isinstance(order, Submit):
                box.begin(order.key, self._generate(box, order))

    async def _generate(self, box: Outbox, order: Submit) -> None:
        count = self.running[order.request_id] = self.running.get(order.request_id, 0) + 1
        assert count == 1, "it runs twice"
        try:
            for token in range(len(order.options.output), TOKENS):
                await asyncio.sleep(STEP_SECONDS)
                box.put(Delta(order.key, [token], finish="length" if token == TOKENS - 1 else None))
        finally:
            self.running[order.request_id] -= 1


def _status(sent_at: float, box: Outbox) -> Status:
    nothing = (0, 0, 0, 1, {})
    return Status(
        Report(sent_at, box.received, box.ended, *nothing), step_age=0.0, draining=False, state="running"
    )


def _call(key: int, prompt: list[int], params: SamplingParams, options: RequestOptions) -> Call:
    return Call(key, f"r{key}", prompt, params, options, 0.0)


async def _tokens(dispatcher: Dispatcher, call: Call, after: float) -> list[int]:
    await asyncio.sleep(after)
    await dispatcher.place(call)
    found: list[int] = []
    while True:
        output = await call.next()
        found += output.token_ids_delta
        if output.finished:
            return found


@settings(max_examples=60)
@given(
    replicas=st.integers(1, 2),
    cuts=st.lists(st.floats(0.1, 12.0), max_size=4).map(sorted),
    lag=st.floats(0.0, 0.9),
    delays=st.lists(st.floats(0.0, 6.0), min_size=1, max_size=6),
    afters=st.lists(st.floats(0.0, 6.0), min_size=1, max_size=4),
)
@example(replicas=1, cuts=[1.0], lag=0.5, delays=[3.0, 0.0], afters=[0.5])
@pytest.mark.slow
def test_each_token_comes_once(
    replicas: int, cuts: list[float], lag: float, delays: list[float], afters: list[float]
) -> None:
    """A request that was on its way to a channel that broke runs nowhere when it arrives late."""
    config = FleetConfig(engine=EngineConfig(model="tiny"), replicas=replicas, migration_limit=100)

    async def main() -> None:
        there = Replicas(cuts, lag, delays)
        members = Members(config, there, gateway="gateway")
        dispatcher = Dispatcher(members)
        members.start()
        calls = [_call(key, [5, 6], SamplingParams(seed=1), RequestOptions()) for key in range(len(afters))]
        asked = [_tokens(dispatcher, call, after) for call, after in zip(calls, afters, strict=True)]
        async with asyncio.timeout(100):
            assert await asyncio.gather(*asked) == [list(range(TOKENS))] * len(afters)
        await asyncio.sleep(10)
        for replica in members.members:
            channel = members.channel(replica)
            assert channel is not None and not channel.calls and channel.sending == 0
        assert not any(there.running.values())
        await members.stop(SystemError("the end"))  # type: ignore[arg-type]
        while there.tasks:
            await asyncio.sleep(1)

    with pytest.MonkeyPatch.context() as patch:
        serve_names({f"r{number}" for number in range(replicas)}, patch)
        run_in_virtual_time(main())


numbers = st.sampled_from([0, 5, 2**63, 2**64, 2**200])


@settings(max_examples=60)
@given(
    prompt=st.lists(numbers | st.just(-1), min_size=1, max_size=3),
    params=st.fixed_dictionaries(
        {},
        optional={
            "stop": st.sampled_from(["x", "\ud800"]),
            "stop_token_ids": st.lists(numbers, max_size=2),
            "logit_bias": st.dictionaries(numbers, st.just(1), max_size=2),
        },
    ),
    priority=numbers.map(lambda number: -number),
    expected=st.none() | numbers.map(lambda number: number + 1),
)
@example(prompt=[2**64], params={}, priority=0, expected=None)
@pytest.mark.slow
def test_what_cannot_be_sent_harms_no_other_request(
    prompt: list[int], params: dict[str, Any], priority: int, expected: int | None
) -> None:
    """It is in one batch with others. Where the model is, ids are compared with its vocabulary."""
    config = FleetConfig(engine=EngineConfig(model="tiny"), replicas=2)

    async def main() -> None:
        members = Members(config, Replicas([], 0.0, [0.0]), gateway="gateway")
        dispatcher = Dispatcher(members)
        members.start()
        await members.complete(10.0)
        usual = SamplingParams(seed=1), RequestOptions()
        calls = [_call(key, [5, 6], *usual) for key in range(4)]
        works = [asyncio.create_task(_tokens(dispatcher, call, 1.0)) for call in calls]
        try:
            options = RequestOptions(priority=priority, expected_tokens=expected)
            bad = _call(4, prompt, SamplingParams(seed=1, **params), options)
            assert await _tokens(dispatcher, bad, 1.0) == list(range(TOKENS))
        except RequestInvalid:
            pass
        assert await asyncio.gather(*works) == [list(range(TOKENS))] * 4
        assert not members.losses and not dispatcher.migrations
        await members.stop(SystemError("the end"))  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        serve_names({"r0", "r1"}, patch)
        run_in_virtual_time(main())


@pytest.mark.parametrize("prompt", [[-1], [5] * 300 + [2**63], [2**31], [2**200]])
async def test_ids_that_no_vocabulary_has_are_refused_at_the_gateway(prompt: list[int]) -> None:
    """Prefixes are hashed there, as 64-bit numbers, before a replica sees the prompt."""
    with pytest.raises(RequestInvalid, match=f"{prompt[-1]} is outside the vocabulary"):
        await tokenize(prompt, None, vocab=2**31, limit=1000, tokenizer=None, work=TextWork())
