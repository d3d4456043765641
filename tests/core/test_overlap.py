"""A step that is formed while the one before it is in flight: what it has, and what becomes of it."""

from __future__ import annotations

from typing import Any

import pytest
from support.core_sim import LIMITS, CoreSim

from aioengine.core.state import Request
from aioengine.request import RequestOptions, SamplingParams
from aioengine.step import UNKNOWN


def decoding(sim: CoreSim, *adapters: str | None, max_tokens: int = 20) -> list[Request]:
    """Requests that all decode; a plain step of theirs is in flight."""
    for name in adapters:
        if name is not None and name not in sim.core.residency.current:
            sim.register(name)
    requests = [sim.add(name, max_tokens=max_tokens) for name in adapters]
    while not all(request.output_tokens for request in requests):
        sim.settle()
    sim.schedule()  # the policy says that it has nothing to do
    sim.finish_step()
    sim.schedule()
    return requests


def other(sim: CoreSim, **params: Any) -> Request:
    """A request with other sampling parameters."""
    sim.count += 1
    params = {"max_tokens": 20, **params}
    options = RequestOptions()
    return sim.core.add_request(f"r{sim.count}", [3, 4], SamplingParams(**params), options, sim.now)


def outputs(overlap: bool) -> tuple[list[list[int]], int]:
    """The outputs of requests with ends of their own, and how many steps were formed beforehand."""
    sim = CoreSim()
    for name in ("a", "b"):
        sim.register(name)
    requests = [
        sim.add(name, prompt=[5 + i] * (3 + 5 * i), max_tokens=6 + 4 * i)
        for i, name in enumerate((None, "a", "b", "a"))
    ]
    early = 0
    while sim.core.requests:
        while sim.loads:
            sim.finish_load()
        while sim.copies:
            sim.finish_copy()
        if sim.batch is None:
            sim.schedule()
        if overlap and sim.batch is not None:
            early += sim.schedule_next() is not None
            sim.core.check()
        if sim.batch is not None:
            sim.finish_step()
        sim.core.check()
        sim.now += 0.01
    return [request.tokens[request.prompt_len :] for request in requests], early


def test_no_token_changes() -> None:
    plain, none = outputs(overlap=False)
    overlapped, early = outputs(overlap=True)
    assert overlapped == plain
    assert early > 5 > none == 0


def test_it_is_the_same_requests_one_token_later() -> None:
    sim = CoreSim()
    first, second = decoding(sim, None, "a")
    batch, following = sim.batch, sim.schedule_next()
    assert batch is not None and following is not None and following.follows
    assert [work.request_id for work in following.sequences] == [first.id, second.id]
    assert [work.tokens for work in following.sequences] == [(UNKNOWN,), (UNKNOWN,)]
    assert [work.start for work in following.sequences] == [w.start + 1 for w in batch.sequences]
    sim.finish_step()
    assert sim.batch is following
    assert [len(work.history) for work in following.sequences] == [w.start + 1 for w in following.sequences]


def test_the_blocks_that_a_step_in_flight_reads_are_another_list() -> None:
    sim = CoreSim()
    (request,) = decoding(sim, None)
    for _ in range(2 * LIMITS.block_size):
        assert sim.batch is not None
        before = list(sim.batch.sequences[0].block_table)
        assert sim.schedule_next() is not None
        assert list(sim.batch.sequences[0].block_table) == before
        sim.finish_step()
    assert len(request.blocks) > 2


@pytest.mark.parametrize("reason", ["stop", "abort"])
def test_what_is_computed_for_a_request_that_has_ended_is_dropped(reason: str) -> None:
    sim = CoreSim()
    request, stays = decoding(sim, "a", None)
    assert sim.schedule_next() is not None
    if reason == "abort":
        sim.core.end(request, "abort", sim.now)
    else:
        sim.next_token = lambda history: 1 if history[: len(request.tokens)] == request.tokens else 7
    known = len(request.tokens)
    sim.finish_step()
    assert sim.ended == {request.id: reason}
    blocks = sim.core.blocks.num_free
    assert request.blocks and request.adapter is not None and request.adapter.running == 1, "it is read still"
    sim.core.check()
    sim.finish_step()
    assert not request.blocks and request.adapter.running == 0 and sim.core.blocks.num_free > blocks
    assert len(request.tokens) == known + (reason == "stop")
    assert stays.output_tokens == stays.made_tokens > 3
    sim.core.check()


def test_one_that_was_taken_back_has_left_nothing() -> None:
    sim = CoreSim()
    (request,) = decoding(sim, None)
    assert sim.schedule_next() is not None
    late = sim.add(None)
    sim.take_back()
    sim.finish_step()
    assert sim.batch is None
    batch = sim.schedule()
    assert batch is not None and {work.request_id for work in batch.sequences} == {request.id, late.id}


def test_none_while_somebody_waits() -> None:
    sim = CoreSim()
    decoding(sim, None)
    sim.add(None)
    assert sim.schedule_next() is None


def test_none_beyond_the_last_token() -> None:
    sim = CoreSim()
    (request,) = decoding(sim, None, max_tokens=9)
    while sim.schedule_next() is not None:
        sim.finish_step()
    assert request.output_tokens == 8


@pytest.mark.parametrize("params", [{"repetition_penalty": 1.2}, {"presence_penalty": 0.1}])
def test_none_where_the_token_is_needed_for_more(params: dict[str, Any]) -> None:
    sim = CoreSim()
    other(sim, **params)
    for _ in range(3):
        sim.settle()
    sim.schedule()
    assert sim.schedule_next() is None


def test_none_when_a_deadline_is_due() -> None:
    sim = CoreSim()
    decoding(sim, None)
    sim.finish_step()
    sim.add(None, max_tokens=20, deadline=sim.now + 1)
    for _ in range(3):
        sim.settle()
    sim.schedule()
    assert sim.schedule_next() is not None
    sim.take_back()
    sim.now += 1.5
    assert sim.schedule_next() is None


def test_none_without_a_free_block() -> None:
    sim = CoreSim(LIMITS._replace(num_blocks=4, max_model_len=16))
    (request,) = decoding(sim, None, max_tokens=13)
    while sim.schedule_next() is not None:
        sim.finish_step()
    assert request.computed < 16 and sim.core.batcher.preemptions == 0
