from __future__ import annotations

import asyncio
import itertools

import pytest

from aioengine import events
from aioengine.core.state import Status
from aioengine.errors import DeadlineExceeded
from aioengine.schedulers import Decision, Location, Place, SchedulerPolicy, SchedulerView
from aioengine.testing import LIMITS, Sim, next_token


def expected_output(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class Scripted(SchedulerPolicy):
    """Returns the next of the given decisions, then nothing."""

    def __init__(self, *answers: object) -> None:
        self.answers = list(answers)

    def schedule(self, view: SchedulerView) -> Decision:
        return self.answers.pop(0) if self.answers else Decision()  # type: ignore[return-value]


def refusals(sim: Sim) -> list[str]:
    return [event.reason for event in sim.of(events.PolicyRefused)]  # type: ignore[attr-defined]


def test_an_adapter_is_read_copied_and_only_then_used() -> None:
    sim = Sim()
    entry = sim.register("a")
    sim.add("a")
    assert sim.schedule() is None
    assert sim.loads == [entry]
    sim.finish_load()
    assert sim.schedule() is None
    assert [(move.entry, move.slot) for move in sim.copies] == [(entry, 0)]
    assert entry.location is Location.CPU
    sim.finish_copy()
    batch = sim.schedule()
    assert batch is not None
    assert [work.slot for work in batch.sequences] == [0]
    assert batch.slot_ranks == [8, 0]


def test_replaced_version_finishes_what_it_accepted_and_is_then_freed() -> None:
    sim = Sim()
    old = sim.register("a")
    first = sim.add("a", max_tokens=6)
    for _ in range(3):
        sim.settle()
    new = sim.register("a")
    second = sim.add("a")
    assert (first.adapter, second.adapter) == (old, new)
    assert (old.name, new.name) == ("a@1", "a")
    sim.run()
    sim.settle()
    assert old.uid not in sim.core.residency.entries
    unloaded = sim.of(events.AdapterUnloaded)
    assert [(e.adapter, e.version) for e in unloaded] == [("a", 1)]  # type: ignore[attr-defined]
    assert list(sim.on_cpu) == [new.uid]


def test_ending_a_request_in_flight_keeps_its_blocks_until_the_step_is_back() -> None:
    sim = Sim()
    request = sim.add()
    sim.schedule()
    free = sim.core.blocks.num_free
    sim.core.end(request, "abort", sim.now)
    assert request.status is Status.ENDED
    assert sim.core.blocks.num_free == free
    sim.core.check()
    sim.finish_step()
    assert sim.core.blocks.num_free == LIMITS.num_blocks
    assert sim.ended == {"r1": "abort"}


def test_deadlines_end_waiting_and_running_requests() -> None:
    sim = Sim()
    sim.register("a")
    waiting = sim.add("a", deadline=1.0)
    running = sim.add(max_tokens=40, deadline=1.5)
    assert sim.core.next_due() == 1.0
    sim.schedule()
    sim.now = 1.2
    sim.finish_step()
    sim.schedule()
    assert sim.ended == {waiting.id: "error"}
    sim.finish_step()
    sim.now = 2.0
    sim.schedule()
    assert sim.ended == {waiting.id: "error", running.id: "error"}
    errors = [e.error for e in sim.of(events.RequestEnded)]  # type: ignore[attr-defined]
    assert all(isinstance(error, DeadlineExceeded) for error in errors)
    assert sim.core.next_due() is None
    assert "for adapter 'a' (location: loading)" in str(errors[0])
    assert "adapter" not in str(errors[1])


def test_pinned_adapters_go_to_a_slot_unasked_and_stay() -> None:
    sim = Sim()
    pinned = sim.register("p")
    sim.core.residency.names.of(pinned.label).load(sim.now, pinned)
    sim.core.residency.names.of(pinned.label).pin(sim.now)
    for _ in range(3):
        sim.settle()
    assert pinned.location is Location.SLOT
    for name in "abcd":
        sim.register(name)
        sim.add(name)
    sim.run()
    assert pinned.location is Location.SLOT


@pytest.mark.parametrize(
    "answer",
    [
        None,
        "admit everything",
        Decision(admit="r1"),
        Decision(admit=[1]),  # type: ignore[list-item]
        Decision(place=[Place("a", "0")]),  # type: ignore[arg-type]
        Decision(prefetch=None),  # type: ignore[arg-type]
        Decision(admit=itertools.repeat("r1")),  # type: ignore[arg-type]
        Decision(admit=["r1"] * 100_000),
        Decision(reject=["r1"]),  # type: ignore[list-item]
        Decision(reject=[("r1", 3)]),  # type: ignore[list-item]
        Decision(reject=[("r1", "a", "b")]),  # type: ignore[list-item]
    ],
)
def test_a_malformed_decision_falls_back_to_the_safe_policy(answer: object) -> None:
    sim = Sim(policy=Scripted(answer), strict=False)
    sim.add()
    assert sim.schedule() is not None
    assert len(sim.of(events.PolicyFailed)) == 1


def test_a_policy_that_raises_is_survived() -> None:
    class Raises(SchedulerPolicy):
        def schedule(self, view: SchedulerView) -> Decision:
            raise RuntimeError("bug")

        def on_event(self, event: object) -> None:
            raise asyncio.CancelledError("another")

    sim = Sim(policy=Raises(), strict=False)
    sim.add()
    sim.run()
    assert sim.ended == {"r1": "length"}
    errors = {e.error for e in sim.of(events.PolicyFailed)}  # type: ignore[attr-defined]
    assert errors == {"Raises: RuntimeError: bug", "Raises.on_event: CancelledError: another"}


def test_each_bad_item_is_refused_alone() -> None:
    decision = Decision(
        admit=["ghost", "r1", "r1", "r2"],
        place=[Place("ghost"), Place("a", 7)],
        prefetch=["ghost"],
        preempt=["r1", "ghost"],
    )
    sim = Sim(policy=Scripted(Decision(prefetch=["a"]), decision))
    sim.register("a")
    sim.add()
    sim.add("a")
    assert sim.schedule() is None
    sim.finish_load()
    batch = sim.schedule()
    assert batch is not None
    assert [work.request_id for work in batch.sequences] == ["r1"], "the good item is carried out"
    assert sorted(refusals(sim)) == [
        "admit_adapter_not_ready",
        "admit_not_waiting",
        "admit_unknown_request",
        "place_slot_unknown",
        "place_unknown_adapter",
        "preempt_not_running",
        "preempt_not_running",
        "prefetch_unknown_adapter",
    ]


@pytest.mark.parametrize("leaves", ["preempted", "aborted"])
def test_a_request_that_resumes_with_one_token_and_leaves_is_in_no_further_batch(leaves: str) -> None:
    """All but its last token is in the prefix cache. The batch after it is not the batch before."""
    both, none = Decision(admit=["r1", "r2"]), Decision()
    last = Decision(preempt=["r2"]) if leaves == "preempted" else none
    sim = Sim(policy=Scripted(both, Decision(preempt=["r2"]), Decision(admit=["r2"]), last))
    size = sim.core.limits.block_size
    for start in (3, 4):
        sim.add(prompt=[start] * size, max_tokens=20)
    batches = []
    for step in range(4):
        if step == 3 and leaves == "aborted":
            sim.core.end(sim.core.requests["r2"], "abort", sim.now)
        batch = sim.schedule()
        assert batch is not None
        batches.append([work.request_id for work in batch.sequences])
        sim.finish_step()
    assert batches == [["r1", "r2"], ["r1"], ["r1", "r2"], ["r1"]]
    sim.core.check()


def test_slots_that_must_not_be_taken_are_refused() -> None:
    sim = Sim(LIMITS._replace(num_slots=2, cpu_capacity=4))
    for name in "abc":
        sim.register(name)
    sim.add("a", max_tokens=30)
    for _ in range(3):
        sim.settle()
    for name in "bc":
        sim.core.residency.names.of(name).load(sim.now)
    sim.settle()
    while sim.loads:
        sim.finish_load()
    # Slot 0 runs a; slot 1 is being written with b.
    sim.core.guard.policy = Scripted(
        Decision(place=[Place("c", 0), Place("b", 1), Place("c", 1), Place("b"), Place("c")]),
    )
    sim.schedule()
    assert refusals(sim) == [
        "place_slot_busy",
        "place_slot_loading",
        "place_already_placed",
        "place_no_slot",
    ]
    sim.core.check()


def test_an_admission_that_does_not_fit_is_not_overtaken() -> None:
    sim = Sim(LIMITS._replace(num_blocks=16))
    sim.add(prompt=[3] * 40, max_tokens=8)
    sim.settle()
    big = sim.add(prompt=[4] * 30)
    small = sim.add(prompt=[5])
    sim.settle()
    assert big.status is Status.WAITING
    assert small.status is Status.WAITING
    sim.run()
    admitted = [e.request_id for e in sim.of(events.RequestAdmitted)]  # type: ignore[attr-defined]
    assert admitted == ["r1", "r2", "r3"]
