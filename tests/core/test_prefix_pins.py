"""Pinned prefixes: kept for their time and within bounds, given up where requests need the blocks."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.device_memory import DeviceMemory

from aioengine import events
from aioengine.core.blocks import BlockManager, PrefixPins
from aioengine.core.state import Request
from aioengine.request import CachePin
from aioengine.schedulers import load_policy
from aioengine.testing import LIMITS, Sim

PINNING = LIMITS._replace(max_pinned_blocks=8)
PROMPT = [7] * 17
"""Four full blocks, and one token."""


def asks(sim: Sim, prompt: list[int], tokens: int = 0, seconds: float = 100.0, **fields: object) -> Request:
    """Add a request that pins the first ``tokens`` of its prompt."""
    pins = [CachePin(tokens=tokens, seconds=seconds)] if tokens else []
    return sim.add(prompt=prompt, max_tokens=fields.pop("max_tokens", 1), cache_pins=pins, **fields)  # type: ignore[arg-type]


def flood(sim: Sim, requests: int = 10) -> None:
    """Run requests with other prompts, each alone; they need more blocks than there are."""
    for i in range(requests):
        asks(sim, [100 + i] * 20)
        sim.run()


def test_a_pinned_prefix_outlives_what_a_plain_one_does_not() -> None:
    for tokens, kept in ((0, 0), (16, 16), (11, 8), (3, 0), (1000, 16)):
        sim = Sim(PINNING)
        first = asks(sim, PROMPT, tokens)
        sim.run()
        assert first.pinned_tokens == len(sim.core.blocks.pins) * 4 == kept
        flood(sim)
        again = asks(sim, PROMPT)
        sim.run()
        assert (again.cached_tokens, again.pinned_tokens) == (kept, 0)


def test_a_pin_ends_its_seconds_after_the_last_use() -> None:
    sim = Sim(PINNING)
    asks(sim, PROMPT, 16, seconds=5.0)
    sim.run()
    sim.now += 4.0
    asks(sim, PROMPT)  # a use, although it pins nothing itself
    sim.run()
    last = sim.now
    sim.now += 4.0
    flood(sim, 1)
    assert len(sim.core.blocks.pins) == 4
    due = sim.core.next_due()
    assert due is not None and due <= last + 5.0, "somebody has to come and end it"
    sim.now = last + 5.1
    sim.schedule()
    assert len(sim.core.blocks.pins) == 0 and sim.core.next_due() is None
    sim.core.check()


def test_a_running_request_takes_pinned_blocks_before_one_is_preempted() -> None:
    sim = Sim(PINNING)  # 24 blocks
    asks(sim, PROMPT, 16)
    sim.run()
    grows = [asks(sim, [100 + i] * 4, max_tokens=44) for i in range(2)]  # 12 blocks each in the end
    sim.run()
    assert not sim.of(events.RequestPreempted)
    assert all(sim.ended[request.id] == "length" for request in grows)
    assert len(sim.core.blocks.pins) == 0 and sim.core.blocks.pins_lost == 4


def test_a_newcomer_waits_for_running_requests_and_not_for_pins() -> None:
    sim = Sim(PINNING)
    asks(sim, PROMPT, 16)
    sim.run()
    runs = asks(sim, [9] * 41, max_tokens=7)  # 11 of the 24 blocks, later 12; 4 are pinned
    while runs.output_tokens < 2:
        sim.settle()
    fits = asks(sim, [8] * 40)
    sim.settle()
    assert fits.admitted is None and len(sim.core.blocks.pins) == 4, "it fits when the first ends"
    sim.run()
    assert sim.ended[fits.id] == "length" and len(sim.core.blocks.pins) == 4


@pytest.mark.parametrize("policy", ["fair", {"order": "priority", "preempt": "priority"}])
def test_policies_make_room_beside_pins(policy: Any) -> None:
    sim = Sim(PINNING, load_policy(policy))  # 24 blocks
    asks(sim, [7] * 33, 32, tenant="a")
    sim.run()
    for i in range(20):
        asks(sim, [100 + i] * 17, max_tokens=40, tenant="a")
    while len(sim.core.batcher.running) < 3:  # 5 blocks each, 8 are pinned, 1 is free
        sim.settle()
    other = asks(sim, [9] * 21, tenant="b", priority=1)
    sim.settle()
    sim.settle()
    assert other.admitted is not None, "who has all blocks that are not pinned gives some"
    assert len(sim.core.blocks.pins) > 4, "and the pins stay"
    sim.run()


def test_a_tenant_may_have_all_until_others_pin_too() -> None:
    sim = Sim(PINNING._replace(num_blocks=100))

    def pinned(tenant: str, prompt: int) -> int:
        asks(sim, [prompt] * 17, 16, tenant=tenant)
        sim.run()
        sim.core.check()
        return sim.core.blocks.pins.count(tenant)

    assert [pinned("a", i) for i in range(3)] == [4, 8, 8]
    assert pinned("b", 50) == 4
    assert sim.core.blocks.pins.count("a") == 4
    again = asks(sim, [2] * 17)
    sim.run()
    assert again.cached_tokens == 16
    assert pinned("a", 2) == 4, "the last one that it has used is what is left"


def test_behind_a_window_only_what_is_seen_is_pinned() -> None:
    sim = Sim(PINNING._replace(window=6, num_blocks=20), memory=DeviceMemory)
    prompt = list(range(2, 43))
    first = asks(sim, prompt, 36)
    sim.run()
    assert first.pinned_tokens == 36
    assert len(sim.core.blocks.pins) == 3, "the first block, and two that the window reaches"
    flood(sim)
    again = asks(sim, prompt)
    sim.run()
    assert again.cached_tokens == 36


class Ask(NamedTuple):
    tenant: str
    tree: list[int]
    """The path of a prefix in a tree: two of them share the blocks of their common beginning."""
    seconds: float
    wait: float
    kind: str


ASKS = st.lists(
    st.builds(
        Ask,
        tenant=st.sampled_from("abc"),
        tree=st.lists(st.integers(0, 1), min_size=1, max_size=5),
        seconds=st.sampled_from([1.0, 3.0, 10.0]),
        wait=st.sampled_from([0.0, 0.5, 2.0]),
        kind=st.sampled_from(["pin", "pin", "pin", "use", "remove"]),
    ),
    max_size=40,
)


@given(ASKS, st.integers(0, 9), st.none() | st.integers(0, 5))
def test_pins_hold_their_bounds_and_their_times(asked: list[Ask], most: int, each: int | None) -> None:
    pins, now = PrefixPins(most, each), 0.0
    until: dict[bytes, tuple[float, float]] = {}
    """The end of each pin and its seconds, by the plain rule."""
    for ask in asked:
        now += ask.wait
        gone = set(pins.expire(now))
        assert gone == {digest for digest, (end, _) in until.items() if end <= now}
        for digest in gone:
            del until[digest]
        prefix = [bytes(ask.tree[: i + 1]) for i in range(len(ask.tree))]
        if ask.kind == "use":
            pins.use(prefix, now)
            for digest in until.keys() & set(prefix):
                end, seconds = until[digest]
                until[digest] = max(end, now + seconds), seconds
        elif ask.kind == "remove":
            pins.remove(prefix[-1])
            until.pop(prefix[-1], None)
        else:
            before = {tenant: pins.count(tenant) for tenant in "abc"}
            lost = pins.pin(ask.tenant, prefix, ask.seconds, now)
            wanted = prefix[: pins.most_per_tenant]
            for digest in wanted:
                end, seconds = until.get(digest, (0.0, 0.0))
                until[digest] = max(end, now + ask.seconds), max(seconds, ask.seconds)
            assert len(lost) == len(set(lost)) and set(lost) <= until.keys()
            for digest in lost:
                del until[digest]
            held = [digest in pins for digest in wanted]
            assert held == sorted(held, reverse=True), "a prefix is lost from its end"
            for other in set("abc") - {ask.tenant}:
                if pins.count(other) < before[other] - sum(digest in wanted for digest in prefix):
                    assert pins.count(other) + 1 >= pins.count(ask.tenant), "only who had more gives"
        pins.check()
        assert {digest for digest in until if digest in pins} == until.keys() and len(pins) == len(until)


@given(st.data())
@pytest.mark.slow
def test_blocks_are_kept_exactly_while_their_contents_are_pinned(data: st.DataObject) -> None:
    blocks = BlockManager(data.draw(st.integers(4, 16)), 2, pins=PrefixPins(data.draw(st.integers(0, 8)), 6))
    held: list[list[int]] = []
    now = 0.0
    for _ in range(data.draw(st.integers(1, 30))):
        now += data.draw(st.sampled_from([0.0, 1.0]))
        kind = data.draw(st.sampled_from(["add", "add", "add", "release", "expire"]))
        if kind == "release" and held:
            blocks.release(held.pop(data.draw(st.integers(0, len(held) - 1))))
        elif kind == "expire":
            blocks.expire(now)
        elif kind == "add":
            tokens = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=12))
            hashes = blocks.hash_blocks(b"", tokens, [])
            shared = blocks.match(hashes, len(tokens) - 1)
            blocks.pins.use(hashes[: len(shared)], now)
            new = blocks.blocks_for(len(tokens)) - len(shared)
            kept, lost = blocks.kept_beside(shared), blocks.pins_lost
            if blocks.can_allocate(new, shared):
                beside = blocks.can_allocate(new + kept, shared)
                mine = blocks.allocate(new, shared)
                assert blocks.pins_lost == lost or not beside, "a pin was given up without need"
                for block, digest in zip(mine, hashes, strict=False):
                    blocks.commit(block, digest)
                held.append(mine)
                if data.draw(st.booleans()):
                    count = blocks.pin(data.draw(st.sampled_from("ab")), hashes, 2.0, now)
                    assert all(digest in blocks.pins for digest in hashes[:count])
        blocks.check(held)
