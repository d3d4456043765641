"""The border between adapters and KV blocks in one memory: who gives way to whom, and what moves."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.shared_memory import DeviceMemory

from aioengine import events
from aioengine.core.adapters.arena import GRANULE, packing
from aioengine.core.blocks import BlockManager
from aioengine.core.state import Request
from aioengine.errors import AdapterTooLarge
from aioengine.schedulers import Decision, Location, Place, SchedulerPolicy, SchedulerView, load_policy
from aioengine.testing import LIMITS, Sim

SHARED = LIMITS._replace(
    num_slots=6, cpu_capacity=12, max_loads=4, num_blocks=24, shared_block_bytes=GRANULE * LIMITS.block_size
)
"""24 blocks of 4 granules, 16 of which are the longest request's: so adapters have at most 8 blocks."""


class Scripted(SchedulerPolicy):
    """Places and evicts what the test says, once, and admits all."""

    def __init__(self) -> None:
        self.next = Decision()
        self.view: SchedulerView | None = None

    def schedule(self, view: SchedulerView) -> Decision:
        self.view = view
        decision, self.next = self.next, Decision()
        return decision._replace(admit=[request.request_id for request in view.waiting])


class MemorySim(Sim):
    def __init__(self) -> None:
        self.policy = Scripted()
        super().__init__(SHARED, self.policy, memory=DeviceMemory)

    def read(self, **granules: int) -> None:
        """Adapters of these sizes, on the CPU."""
        for name, size in granules.items():
            self.sizes[name] = size * GRANULE
            entry = self.register(name)
            self.core.residency.want(entry, self.now)
        for _ in range(len(granules)):
            self.step()
            while self.loads:
                self.finish_load()

    def step(self, *place: str, evict: tuple[str, ...] = ()) -> list[str]:
        """One step and all copies; returns what was refused."""
        before = len(self.events)
        self.now += 0.1
        self.policy.next = Decision(place=[Place(name) for name in place], evict=evict)
        if self.schedule() is not None:
            self.finish_step()
        self.core.check()
        while self.copies:
            self.finish_copy()
        return [event.reason for event in self.events[before:] if isinstance(event, events.PolicyRefused)]

    def prefix(self, first: int) -> None:
        """Leave a cached prefix of 16 blocks behind."""
        self.add(prompt=list(range(first, first + 63)), max_tokens=1)
        self.run()

    def runs_beside_the_border(self, **granules: int) -> Request:
        """Read adapters, for each of which a request waits, while one has the first blocks, and the others
        are cached."""
        self.read(**granules)
        self.add(prompt=list(range(100, 139)), max_tokens=1)
        self.run()
        request = self.add(prompt=list(range(52)), max_tokens=12)
        for _ in range(4):
            self.step()
        assert min(request.blocks) < 4
        for name in granules:
            self.add(name, max_tokens=1)
        return request

    @property
    def resident(self) -> str:
        held = [(s.offset or 0, s.entry.name) for s in self.core.slots.slots if s.entry is not None]
        return "".join(name for _, name in sorted(held))


def test_adapters_take_free_blocks_and_give_them_back_for_a_sequence() -> None:
    sim = MemorySim()
    sim.read(a=9, b=5)
    sim.step("a", "b")
    assert (sim.resident, sim.core.blocks.size) == ("ab", 24 - 4)
    for first in (10, 200):  # 16 and 4 blocks: with what adapters have, that is too many
        sim.add(prompt=list(range(first, first + 40)), max_tokens=24)
    sim.run()
    assert sim.resident == "" and sim.core.blocks.size == 24
    assert len(sim.ended) == 2


def test_a_prefix_goes_for_an_adapter_that_requests_wait_for_and_for_no_other() -> None:
    sim = MemorySim()
    sim.read(a=8)
    sim.prefix(10)
    sim.prefix(100)
    assert sim.core.blocks.num_cached >= 20
    memory = sim.policy.view.memory if sim.policy.view else None
    assert memory is not None and memory.shared and memory.cached_blocks == sim.core.blocks.num_cached
    assert sim.step("a") == ["place_no_room"], "nobody asks for it"
    sim.add("a", max_tokens=1)
    assert sim.step("a") == ["admit_adapter_not_ready"] and sim.resident == "a"
    sim.run()


def test_what_the_decision_gives_up_goes_before_a_prefix() -> None:
    kept = []
    for evict in ((), ("a",)):
        sim = MemorySim()
        sim.read(a=16, b=16)
        sim.step("a")
        sim.prefix(10)
        sim.prefix(100)
        assert (sim.core.blocks.size, sim.core.blocks.num_cached) == (20, 19)
        sim.add("b", max_tokens=1)
        sim.step("b", evict=evict)
        kept.append(sim.core.blocks.num_cached)
        sim.step()
        assert sim.resident == ("b" if evict else "ab")
        sim.run()
    assert kept == [16, 19]


def test_running_sequences_move_with_their_keys() -> None:
    sim = MemorySim()
    request = sim.runs_beside_the_border(a=8, b=8, c=12)
    sim.step("a", "b", "c")
    moved = [event for event in sim.events if isinstance(event, events.BlocksMoved)]
    assert sum(event.blocks for event in moved) >= 5, "and DeviceMemory looks at what is read"
    sim.run()
    assert sim.ended[request.id] == "length"


def test_an_adapter_that_runs_is_moved_for_a_sequence() -> None:
    sim = MemorySim()
    sim.read(a=12, b=12)
    sim.step("a", "b")
    running = sim.add("b", max_tokens=30)
    sim.step()
    sim.core.residency.retire(sim.core.residency.current["a"], sim.now)
    sim.step()
    assert sim.resident == "b"
    for i in range(4):
        sim.add(prompt=[i, *range(20, 36)], max_tokens=12)
    sim.run()
    shifted = [event for event in sim.events if isinstance(event, events.AdapterShifted)]
    assert [event.adapter for event in shifted] == ["b"]
    assert sim.ended[running.id] == "length" and len(sim.ended) == 5


def test_an_adapter_beyond_what_a_request_leaves_is_refused() -> None:
    sim = MemorySim()
    entry = sim.register("a")
    sim.core.residency.want(entry, sim.now)
    sim.step()
    error = sim.core.adapter_loaded(
        entry, 1.0, rank=8, nbytes=9, digest="a", seconds=0.1, slot_nbytes=8 * 4 * GRANULE + 1
    )
    assert isinstance(error, AdapterTooLarge) and "raise kv_cache_memory" in str(error)


@pytest.mark.parametrize("policy", ["fcfs", "slora", "vtc", "chameleon", "vllm"])
@pytest.mark.slow
def test_every_policy_serves_all_and_every_key_is_what_was_computed(policy: str) -> None:
    rng = random.Random(policy)
    sim = Sim(SHARED, load_policy(policy), memory=DeviceMemory)
    names = [f"a{i}" for i in range(12)]
    for name in names:
        sim.sizes[name] = rng.choice([1, 2, 3, 5, 8, 13, 21]) * GRANULE - rng.randrange(9)
        sim.register(name)
    prompts = [[rng.randrange(2, 99) for _ in range(24)] for _ in range(4)]
    for i in range(250):
        prompt = [*prompts[i % 4][: rng.randrange(4, 25)], i % 90 + 2]
        sim.add(rng.choice([None, *names]), prompt=prompt, max_tokens=rng.randrange(1, 16))
        for _ in range(rng.randrange(4)):
            sim.settle(step_seconds=0.02)
    sim.run(steps=20_000, step_seconds=0.1)
    kinds = {type(event) for event in sim.events}
    assert {events.BlocksMoved, events.AdapterShifted, events.AdapterEvicted} <= kinds
    assert all(reason == "length" for reason in sim.ended.values()) and len(sim.ended) == 250


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_packing_overwrites_nobody(data: st.DataObject) -> None:
    regions: dict[int, int] = {}
    at = 0
    for _ in range(data.draw(st.integers(0, 8))):
        at += data.draw(st.integers(0, 5))
        regions[at] = data.draw(st.integers(1, 5))
        at += regions[at]
    fixed = data.draw(st.sets(st.sampled_from(sorted(regions)))) if regions else set()
    found = packing(regions, lambda offset: offset not in fixed)
    cells: list[int | None] = [None] * (at + 1)
    for offset, size in regions.items():
        cells[offset : offset + size] = [offset] * size
    where = {offset: offset for offset in regions}
    for offset, to in found.moves:
        assert offset not in fixed and to < offset
        size = regions[offset]
        assert all(cell in (None, offset) for cell in cells[to : to + size]), "somebody is there"
        for i in range(offset, offset + size):
            cells[i] = None
        cells[to : to + size] = [offset] * size
        where[offset] = to
    assert found.end == max((to + regions[offset] for offset, to in where.items()), default=0)
    assert found.end <= at


@given(st.data())
@settings(max_examples=200, deadline=None)
@pytest.mark.slow
def test_lent_blocks_keep_what_sequences_hold(data: st.DataObject) -> None:
    blocks = BlockManager(12, 4, prefix_caching=data.draw(st.booleans()))
    held: list[list[int]] = []
    keys: dict[bytes, None] = {}
    for step in range(data.draw(st.integers(1, 25))):
        match data.draw(st.sampled_from(["take", "commit", "give", "lend", "back"])):
            case "take":
                count = data.draw(st.integers(1, 3))
                if blocks.can_allocate(count):
                    held.append(blocks.allocate(count))
            case "commit" if held:
                keys[key := bytes([step])] = None
                blocks.commit(data.draw(st.sampled_from(held))[0], key)
            case "give" if held:
                blocks.release(held.pop(data.draw(st.integers(0, len(held) - 1))))
            case "lend":
                count = data.draw(st.integers(1, 4))
                if blocks.can_allocate(count):
                    live = {block for table in held for block in table}
                    found = {key: blocks.match([key], 4) for key in keys}
                    moved = dict(blocks.lend(count))
                    held = [[moved.get(block, block) for block in table] for table in held]
                    assert not {moved.get(b, b) for b in live} & set(range(blocks.lent))
                    for key, was in found.items():
                        now = blocks.match([key], 4)
                        assert not now or now == [moved.get(b, b) for b in was]
            case "back" if blocks.lent:
                blocks.take_back(data.draw(st.integers(1, blocks.lent)))
        blocks.check(held)


def test_a_location_is_known_throughout() -> None:
    """An adapter that waits for the step to be over is on its way: nobody places it twice."""
    sim = MemorySim()
    sim.runs_beside_the_border(a=16)
    sim.policy.next = Decision(place=[Place("a")])
    sim.schedule()
    entry = sim.core.residency.current["a"]
    assert entry.location is Location.CPU and entry.slot is not None and not sim.copies
    sim.finish_step()
    assert "place_already_placed" in sim.step("a")
    assert entry.location is Location.SLOT
    sim.run()
