"""Random events and random, partly hostile, policies: the invariants hold after every one.

Rows of a step have no tokens (a late constraint), one, or several: drafts that are right or not, forced
tokens, and several steps at once. Each request gets what one token a step would give it, wherever stop
strings, ends of sequence, ``max_tokens``, log-probabilities and penalties meet the edges of rows, and
whatever happens between forming a step and taking it in.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Literal

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.device_memory import DeviceMemory
from support.hostile_policies import Hostile
from support.rows import RowSim, model

from aioengine.core.adapters.version import LIVES, STATES, Change, ChangeNotAllowed, Life
from aioengine.core.state import AdapterEntry, Status
from aioengine.core.waiting_room import Reservation
from aioengine.errors import EngineOverloaded
from aioengine.schedulers import Location, SlotState
from aioengine.schedulers.policies.fcfs import FCFS
from aioengine.testing import LIMITS

NAMES = ("a", "b", "c", "d")
MIXES = (("a", "b"), ("b", "c"), ("c", "a", "d"), ("b",), ("c", "d"))
SIZES = (400, 1000, 2400, 2600)
MAX_BYTES = 2500


class CoreMachine(RuleBasedStateMachine):
    @initialize(
        seed=st.integers(0, 2**32),
        hostile=st.booleans(),
        blocks=st.integers(16, 40),
        max_bytes=st.sampled_from([None, MAX_BYTES]),
        slot_memory=st.sampled_from([None, 3000, 4200]),
        slot_bytes=st.sampled_from([600, 1000, 1 << 20]),
        bounded=st.sampled_from([None, "requests", "tokens"]),
        speculation=st.sampled_from(["none", "ngram"]),
        remembers=st.booleans(),
        caching=st.booleans(),
        repeats=st.booleans(),
    )
    def start(
        self,
        seed: int,
        hostile: bool,
        blocks: int,
        max_bytes: int | None,
        slot_memory: int | None,
        slot_bytes: int,
        bounded: Literal["requests", "tokens"] | None,
        speculation: Literal["none", "ngram"],
        remembers: bool,
        caching: bool,
        repeats: bool,
    ) -> None:
        self.hostile = hostile
        self.versions: list[AdapterEntry] = []
        """Declared, and not published yet."""
        policy = Hostile(seed) if hostile else FCFS(max_wait=0.5)
        limits = LIMITS._replace(num_blocks=blocks, cpu_max_bytes=max_bytes, speculation=speculation)
        limits = limits._replace(slot_bytes=slot_bytes, prefix_caching=caching)
        if slot_memory is not None:
            limits = limits._replace(slot_memory=slot_memory, num_slots=3)
        if bounded == "tokens":
            limits = limits._replace(max_waiting_tokens=60, max_waiting_tokens_per_tenant=50)
        elif bounded == "requests":
            limits = limits._replace(max_waiting=6, max_waiting_per_tenant=5)
        memory = DeviceMemory if remembers else None
        self.sim = RowSim(limits, policy, model, strict=False, memory=memory, repeats=repeats)
        self.reservations: list[Reservation] = []
        self.lost: list[Reservation] = []
        for name in NAMES[:2]:
            self.sim.register(name)

    @rule(
        adapter=st.sampled_from([None, *NAMES, *MIXES]),
        prompt=st.lists(st.integers(2, 4), min_size=1, max_size=30),
        max_tokens=st.sampled_from([1, 2, 5, 12, 20]),
        deadline=st.sampled_from([None, None, 0.3, 2.0]),
        tenant=st.sampled_from([None, "x", "x", "x", "y"]),
        constrained=st.sampled_from([False, False, True]),
        stop=st.sampled_from([None, None, (4, 5), (6, 3), (3, 2)]),
        logprobs=st.sampled_from([None, None, None, 0]),
        penalty=st.sampled_from([0.0, 0.0, 1.0]),
        late=st.booleans(),
    )
    def add(
        self,
        adapter: str | tuple[str, ...] | None,
        prompt: list[int],
        max_tokens: int,
        deadline: float | None,
        tenant: str | None,
        constrained: bool,
        stop: tuple[int, int] | None,
        logprobs: int | None,
        penalty: float,
        late: bool,
    ) -> None:
        sim = self.sim
        names = (adapter,) if isinstance(adapter, str) else adapter or ()
        for name in names:
            if name not in sim.core.residency.current:
                sim.register(name)
        scale = 1.0
        if isinstance(adapter, tuple) and len(adapter) == 1 and sim.core.residency.current[names[0]].scalable:
            adapter, scale = names[0], 0.5
        elif isinstance(adapter, tuple):
            adapter = sim.mix(*adapter, tenant=tenant)
        due = None if deadline is None else sim.now + deadline
        try:
            request = sim.add(
                adapter,
                prompt=prompt,
                max_tokens=max_tokens,
                deadline=due,
                tenant=tenant,
                constrained=constrained,
                scale=scale,
                logprobs=logprobs,
            )
            request.params = msgspec.structs.replace(request.params, presence_penalty=penalty)
            sim.read(request, stop, late=late)
        except EngineOverloaded as error:
            if sim.core.room.limits.max_waiting_tokens is not None:
                self.check_tokens_refusal(error, tenant, len(prompt))
            else:
                self.check_refusal(error, tenant)
        sim.take_events()

    def check_tokens_refusal(self, error: EngineOverloaded, tenant: str | None, tokens: int) -> None:
        """It is not its tenant's only one, and they are more than a tenant may have, or than its part."""
        limits = self.sim.core.limits
        fresh = [request for request in self.sim.core.queues if request.reservation is not None]
        sums: Counter[str | None] = Counter()
        for request in fresh:
            sums[request.options.tenant] += request.prompt_len
        assert tenant in sums
        more = sums[tenant] + tokens
        if more <= (limits.max_waiting_tokens_per_tenant or 0):
            assert sums.total() + tokens > (limits.max_waiting_tokens or 0) < more * len(sums)
            assert error.bound == ("server" if len(sums) == 1 else "tenant")

    def check_refusal(self, error: EngineOverloaded, tenant: str | None) -> None:
        """Whom it concerns had as many as it may, or no other tenant had many more."""
        limits, room = self.sim.core.limits, self.sim.core.room
        fresh = [request for request in self.sim.core.queues if request.reservation is not None]
        assert error.bound == "tenant" or len(room) >= (limits.max_waiting or 0)
        count = Counter(request.options.tenant for request in fresh)
        count += Counter(place.tenant for place in self.reservations if place not in self.lost)
        if error.bound == "tenant":
            assert count[tenant] == limits.max_waiting_per_tenant
        else:
            assert count[tenant] + 1 >= max(count.values(), default=0)

    @rule(name=st.sampled_from([None, *NAMES]), tenant=st.sampled_from([None, "x", "x", "y"]))
    def reserve(self, name: str | None, tenant: str | None) -> None:
        """A place for a request that is not there yet."""
        try:
            reservation = self.sim.core.reserve(tenant, name, self.sim.now)
        except EngineOverloaded as error:
            self.check_refusal(error, tenant)
        else:
            reservation.displaced = lambda error, now: self.lost.append(reservation)
            self.reservations.append(reservation)
        self.sim.take_events()

    @precondition(lambda self: self.reservations)
    @rule(which=st.integers(0, 100), twice=st.booleans())
    def give_up_a_reserved_place(self, which: int, twice: bool) -> None:
        reservation = self.reservations.pop(which % len(self.reservations))
        for _ in range(1 + twice):
            reservation.leave()

    @precondition(lambda self: self.sim.core.requests)
    @rule(which=st.integers(0, 100))
    def abort(self, which: int) -> None:
        requests = list(self.sim.core.requests.values())
        self.sim.core.end(requests[which % len(requests)], "abort", self.sim.now)
        self.sim.take_events()

    @rule(seconds=st.sampled_from([0.01, 0.2, 1.0]), steps=st.integers(1, 8))
    def step(self, seconds: float, steps: int) -> None:
        sim = self.sim
        if sim.batch is not None:
            sim.finish_step(steps=steps)
        else:
            batch = sim.schedule()
            if batch is not None:
                self.check_batch()
                slots = self.sim.core.slots.slots
                self.in_flight = [(slot.entry, slot.offset) for slot in slots]
        sim.now += seconds

    @precondition(lambda self: self.sim.core.residency.entries)
    @rule(which=st.integers(0, 100), change=st.sampled_from([*STATES, *LIVES]))
    def change_a_version_wrongly(self, which: int, change: Change) -> None:
        """What its state does not allow is refused, and changes nothing."""
        entries = list(self.sim.core.residency.entries.values())
        entry = entries[which % len(entries)]
        now = entry.state if change in STATES else entry.life
        if now not in {**STATES, **LIVES}[change]:  # type: ignore[dict-item] # both kinds
            with pytest.raises(ChangeNotAllowed):
                entry.change(change)
            assert now in (entry.state, entry.life)

    @rule(name=st.sampled_from(NAMES), nbytes=st.sampled_from(SIZES))
    def resize(self, name: str, nbytes: int) -> None:
        self.sim.sizes[name] = nbytes

    @rule(name=st.sampled_from(NAMES), scalable=st.booleans())
    def change_files_in_place(self, name: str, scalable: bool) -> None:
        """They are read when the adapter has left the CPU cache."""
        self.sim.contents[name] = self.sim.contents.get(name, 0) + 1
        (self.sim.unscalable.discard if scalable else self.sim.unscalable.add)(name)

    @precondition(lambda self: self.sim.loads)
    @rule(which=st.integers(0, 100), fail=st.sampled_from([False, False, False, True]))
    def finish_load(self, which: int, fail: bool) -> None:
        self.sim.finish_load(which % len(self.sim.loads), fail=fail)

    @precondition(lambda self: any(not entry.stalled for entry in self.sim.loads))
    @rule(which=st.integers(0, 100))
    def stall_load(self, which: int) -> None:
        running = [entry for entry in self.sim.loads if not entry.stalled]
        room = self.sim.core.residency.load_room
        self.sim.core.residency.load_stalled(running[which % len(running)])
        assert self.sim.core.residency.load_room == room + 1

    @precondition(lambda self: self.sim.copies)
    @rule(which=st.integers(0, 100), fail=st.sampled_from([False, False, False, True]))
    def finish_copy(self, which: int, fail: bool) -> None:
        self.sim.finish_copy(which % len(self.sim.copies), fail=fail)

    @rule(again=st.booleans())
    def lose_device(self, again: bool) -> None:
        core = self.sim.core
        waiting = [request.id for request in core.queues]
        for _ in range(1 + again):
            self.sim.lose_device()
        assert [request.id for request in core.queues] == waiting
        assert not core.running and not core.cpu.entries
        assert core.blocks.num_free == core.blocks.num_blocks
        assert not core.residency.take_moves()

    @precondition(lambda self: self.sim.batch is None)
    @rule(steps=st.integers(1, 6), seconds=st.sampled_from([0.01, 0.3]))
    def settle(self, steps: int, seconds: float) -> None:
        for _ in range(steps):
            self.sim.settle(step_seconds=seconds)

    @rule(name=st.sampled_from(NAMES))
    def replace(self, name: str) -> None:
        self.sim.register(name)

    @rule(name=st.sampled_from(NAMES), found=st.booleans())
    def load_a_version(self, name: str, found: bool) -> None:
        known = self.sim.core.residency.names.of(name)
        entry = known.declare("/elsewhere", source="" if found else None)
        known.load(self.sim.now, entry)
        self.versions.append(entry)

    @rule(give_up=st.booleans())
    def publish_the_versions_that_were_read(self, give_up: bool) -> None:
        """Those that were not may be given up."""
        for entry in [entry for entry in self.versions if entry.life is Life.NEW]:
            known = self.sim.core.residency.names.of(entry.label)
            if entry.location is Location.CPU:
                known.replace(entry, self.sim.now)
            elif give_up:
                known.retire(entry, self.sim.now)
        self.versions = [entry for entry in self.versions if entry.life is Life.NEW]

    def may_pin(self, name: str) -> bool:
        """One slot is left for the others."""
        return all(e.label == name for e in self.sim.core.residency.entries.values() if e.pinned)

    @rule(name=st.sampled_from(NAMES))
    def unload(self, name: str) -> None:
        entry = self.sim.core.residency.current.get(name)
        if entry is not None:
            self.sim.core.residency.names.of(entry.label).retire(entry, self.sim.now)

    @rule(name=st.sampled_from(NAMES), pinned=st.booleans())
    def pin(self, name: str, pinned: bool) -> None:
        entry = self.sim.core.residency.current.get(name)
        if entry is not None and not pinned:
            self.sim.core.residency.names.of(entry.label).unpin(self.sim.now)
        elif entry is not None and self.may_pin(name):
            self.sim.core.residency.names.of(entry.label).pin(self.sim.now)

    @rule(name=st.sampled_from(NAMES), pin=st.booleans())
    def want(self, name: str, pin: bool) -> None:
        known = self.sim.core.residency.names.of(name)
        if known.current is not None:
            known.load(self.sim.now)
            if pin and self.may_pin(name):
                known.pin(self.sim.now)

    @invariant()
    def holds(self) -> None:
        core = self.sim.core
        core.check()
        for reader in self.sim.readers.values():
            self.sim.check_reader(reader)
        reserved = sum(reservation not in self.lost for reservation in self.reservations)
        assert len(core.room) == len(core.queues) + reserved
        if core.room.limits.max_waiting_tokens is not None:
            fresh = [request for request in core.queues if request.reservation is not None]
            assert core.room.tokens == sum(request.prompt_len for request in fresh)
            tenants = {request.options.tenant for request in fresh}
            assert core.room.tokens <= 60 + 30 * len(tenants), "the bound, and one prompt of each tenant"
        if core.limits.max_waiting is not None:
            assert len(core.room) - core.room.returned <= core.limits.max_waiting
        cpu = {e.uid for e in self.sim.core.cpu.entries.values() if e.location is not Location.LOADING}
        assert cpu <= self.sim.on_cpu
        free = core.blocks.free
        if (batch := self.sim.batch) is not None:
            for work in batch.sequences:  # what it reads and writes is not given to anybody else
                assert free.isdisjoint(work.block_table)
                if work.slot >= 0:
                    slot = core.slots.slots[work.slot]
                    assert (slot.entry, slot.offset) == self.in_flight[work.slot], "it was moved"

    def check_batch(self) -> None:
        core, batch = self.sim.core, self.sim.batch
        assert batch is not None
        assert len({work.slot for work in batch.sequences} - {-1}) <= core.limits.num_slots
        assert sum(len(w.tokens) for w in batch.sequences) <= LIMITS.max_num_batched_tokens
        assert len(batch.sequences) <= LIMITS.max_num_seqs
        blocks = [b for w in batch.sequences for b in w.block_table[w.start // LIMITS.block_size :]]
        assert len(blocks) == len(set(blocks)), "two sequences would write one block"
        for work in batch.sequences:
            request = core.requests[work.request_id]
            assert request.status is Status.RUNNING
            if request.adapter is None:
                assert work.slot == -1
            else:
                slot = core.slots.slots[work.slot]
                assert slot.entry is request.adapter, "the very version that it was accepted for"
                assert slot.state in (SlotState.READY, SlotState.DRAINING)
                assert work.scale == request.scale
            assert len(work.block_table) * LIMITS.block_size >= work.start + len(work.tokens)

    def teardown(self) -> None:
        sim = self.sim
        while sim.batch is not None:
            sim.finish_step()
        if self.hostile:
            for request in list(sim.core.requests.values()):
                sim.core.end(request, "abort", sim.now)
            sim.take_events()
        sim.run(steps=5000, step_seconds=0.1)
        assert len(sim.ended) == sim.count, "every accepted request ends exactly once"
        for reader in sim.readers.values():
            sim.check_reader(reader)
        sim.check_events()
        assert sim.core.blocks.num_free == sim.core.blocks.num_blocks
        assert all(entry.running == 0 for entry in sim.core.residency.entries.values())


CoreMachine.TestCase.settings = settings(
    max_examples=int(os.environ.get("AIOENGINE_FUZZ_RUNS", "200")),  # make fuzz runs more
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestCoreMachine = CoreMachine.TestCase
