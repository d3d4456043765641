"""A workload played on an engine: every request at its time, every end recorded once."""

from __future__ import annotations

import asyncio
import json
import random
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engine_fixtures import MakeEngine, Tiny, make_engine, tiny, tiny_of
from support.lab_sim import DISK, MB, SLOT, STEP, Fixed, MemorySink, Played, costs, play, played

from aioengine.lab.runs.replay import RunStalled, replay
from aioengine.lab.workload.requests import AdapterShape, Arrival
from aioengine.schedulers import Decision, SchedulerPolicy, SchedulerView, load_policy

__all__ = ["make_engine", "tiny", "tiny_of"]  # fixtures

A, B, C = (AdapterShape(name, 8, 50 * MB) for name in "abc")
MOVES = DISK.seconds(50 * MB) + SLOT.seconds(50 * MB)


def arrive(time: float, adapter: str | None = None, tokens: int = 4, **fields: object) -> Arrival:
    return Arrival(time, adapter, 10, tokens, **fields)  # type: ignore[arg-type]


def test_a_cold_and_a_warm_request() -> None:
    done, kept = play(Fixed([arrive(1.0, "a"), arrive(5.0, "a", tokens=2, tenant="t")], [A, B]))
    assert done == Played(2, 2, 0, 0, pytest.approx(5 + 2 * STEP))
    cold, warm = kept.requests
    assert cold.request_id == "r0"
    assert (cold.adapter, cold.tenant, cold.prompt_tokens, cold.output_tokens) == ("a", None, 10, 4)
    assert (cold.arrival, cold.reason, cold.found, cold.rank) == (1.0, "stop", "disk", 8)
    assert cold.admitted == pytest.approx(1 + MOVES)
    assert cold.first_token == pytest.approx(1 + MOVES + STEP)
    assert cold.ended == pytest.approx(1 + MOVES + 4 * STEP)
    assert cold.worst_gap == pytest.approx(STEP)
    assert (warm.found, warm.admitted, warm.tenant) == ("slot", 5.0, "t")

    read, copy = kept.moves
    assert (read.stage, read.adapter, read.start, read.nbytes) == ("disk", "a", 1.0, 50 * MB)
    assert (copy.stage, copy.start, copy.end) == ("slot", read.end, pytest.approx(1 + MOVES))

    (span,) = kept.spans
    assert (span.slot, span.adapter, span.start, span.ready) == (0, "a", copy.start, copy.end)
    assert (span.end, span.busy_steps) == (pytest.approx(done.seconds), 6)

    assert [sample.time for sample in kept.samples] == [1, 2, 3, 4, 5, pytest.approx(done.seconds)]
    assert sum(sample.steps for sample in kept.samples) == 6
    assert sum(sample.prefill_tokens for sample in kept.samples) == 20
    assert sum(sample.decode_tokens for sample in kept.samples) == 4
    served = [json.loads(sample.service) for sample in kept.samples]
    assert served == [{}, {}, {"a": 14}, {}, {}, {"t": 12}]


def test_slots_change_hands() -> None:
    names = ["a", "b", "c", "a"]
    _, kept = play(Fixed([arrive(5.0 * i, name) for i, name in enumerate(names)], [A, B, C]))
    assert [(span.adapter, span.slot) for span in kept.spans] == [("a", 0), ("b", 1), ("c", 0), ("a", 1)]
    assert [r.found for r in kept.requests] == ["disk", "disk", "disk", "cpu"]
    assert [move.adapter for move in kept.moves if move.stage == "disk"] == ["a", "b", "c"]
    a, b, c, _ = kept.spans
    assert a.end == c.start
    assert b.end > b.start


def test_what_is_refused_and_what_fails() -> None:
    arrivals = [
        arrive(0.0, tokens=50),
        arrive(0.1, "a", deadline=0.5),  # its adapter is not there by then
        arrive(0.2, "a"),  # it is one too many, if max_waiting=1
        arrive(0.3, "nobody"),
        Arrival(0.4, None, 10**4, 5),  # too long
    ]
    done, kept = play(Fixed(arrivals, [A]), max_waiting=1)
    assert done[:4] == (5, 1, 3, 1)
    by_id = {record.request_id: record for record in kept.requests}
    assert {key: (r.reason, r.error) for key, r in by_id.items()} == {
        "r0": ("stop", None),
        "r1": ("error", "DeadlineExceeded"),
        "r2": ("refused", "EngineOverloaded"),
        "r3": ("refused", "AdapterNotFound"),
        "r4": ("refused", "PromptTooLong"),
    }
    assert (by_id["r1"].deadline, by_id["r1"].admitted) == (0.6, None)
    assert (by_id["r2"].arrival, by_id["r2"].ended, by_id["r2"].rank) == (0.2, 0.2, 8)


def test_adapters_that_do_not_fit_fail_and_are_recorded() -> None:
    done, kept = play(Fixed([arrive(0.0, "big"), arrive(0.0)], [AdapterShape("big", 64, 50 * MB)]))
    assert (done.finished, done.failed) == (1, 1)
    assert [(move.stage, move.error) for move in kept.moves] == [("disk", "AdapterTooLarge")]
    assert {r.error for r in kept.requests} == {None, "AdapterTooLarge"}


def test_preemptions_and_gaps() -> None:
    """Two requests that do not fit into the KV blocks together: the later one gives way."""
    arrivals = [Arrival(0.0, None, 160, 40), Arrival(0.0, None, 160, 20)]
    block = 16 * costs().spec.kv_bytes_per_token(2)
    _, kept = play(Fixed(arrivals), max_model_len=256, kv_cache_memory=21 * block)
    second, first = sorted(kept.requests, key=lambda r: r.ended, reverse=True)
    assert (first.preemptions, second.preemptions) == (0, 1)
    assert first.worst_gap == pytest.approx(STEP)
    assert second.worst_gap is not None
    assert second.worst_gap > 10 * STEP
    served = sum(json.loads(sample.service).get("(base)", 0) for sample in kept.samples)
    assert served == 2 * 160 + 60  # what is computed twice is served once


class Unwilling(SchedulerPolicy):
    def schedule(self, view: SchedulerView) -> Decision:
        return Decision()


@pytest.mark.slow
def test_a_run_that_stands_still_is_given_up() -> None:
    with pytest.raises(RunStalled, match="1 requests wait"):
        play(Fixed([arrive(0.0)]), Unwilling())


def test_long_pauses_are_no_standstill() -> None:
    done, _ = play(Fixed([arrive(0.0), arrive(5000.0)]), sample_seconds=10)
    assert done.finished == 2


def test_the_caller_says_what_is_expected() -> None:
    """The policy goes by the prediction; where there is none, by what is allowed."""
    arrivals = [
        arrive(0.0, tokens=20),  # keeps the others waiting
        arrive(0.1, tokens=5, max_tokens=100),
        arrive(0.1, tokens=5, max_tokens=100, expected_tokens=3),
        arrive(0.1, tokens=5, max_tokens=50),
    ]
    _, kept = play(Fixed(arrivals), load_policy("sjf"), max_num_seqs=1)
    assert [r.request_id for r in kept.requests] == ["r0", "r2", "r3", "r1"]


def test_nothing_to_do() -> None:
    assert play(Fixed([]))[0] == Played(0, 0, 0, 0, 0.0)


POLICIES = ["fcfs", "vllm", "vtc", "sjf+gdsf", "chameleon", "slora", "drr", "edf"]


@pytest.mark.slow
@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from(POLICIES))
def test_every_request_ends_once_and_tokens_add_up(seed: int, policy: str) -> None:
    rng = random.Random(seed)
    time = 0.0
    arrivals = []
    for _ in range(rng.randrange(1, 40)):
        time += rng.choice([0.0, 0.01, 0.3])
        tokens = rng.randrange(1, 30)
        arrivals.append(
            Arrival(
                time,
                rng.choice([None, "a", "b", "c"]),
                rng.randrange(1, 200),
                tokens,
                max_tokens=rng.choice([None, tokens + 10, max(1, tokens - 5)]),
                deadline=rng.choice([None, None, 2.0]),
            )
        )
    done, kept = play(Fixed(arrivals, [A, B, C]), load_policy(policy), max_num_seqs=4)
    assert sorted(int(r.request_id[1:]) for r in kept.requests) == list(range(len(arrivals)))
    assert done.requests == len(arrivals)
    assert done.finished == sum(r.reason in ("stop", "length") for r in kept.requests)
    for record in kept.requests:
        arrival = arrivals[int(record.request_id[1:])]
        if record.reason in ("stop", "length"):
            allowed = arrival.output_tokens if arrival.max_tokens is None else arrival.max_tokens
            assert record.output_tokens == min(arrival.output_tokens, allowed)
            assert record.admitted is not None
            assert record.first_token is not None
            assert record.arrival <= record.admitted < record.first_token <= record.ended
    generated = sum(r.output_tokens for r in kept.requests)
    first = sum(r.first_token is not None for r in kept.requests)
    assert sum(sample.decode_tokens for sample in kept.samples) >= generated - first
    spans = sorted(kept.spans, key=lambda span: (span.slot, span.start))
    for one, other in pairwise(spans):
        assert one.start <= (one.ready or one.start) <= one.end
        assert one.slot != other.slot or one.end <= other.start


async def test_on_a_live_engine(tiny: Tiny, make_engine: MakeEngine) -> None:
    """The same records; outputs are as long as they should be, whatever the model would say."""
    arrivals = [
        Arrival(0.0, "a", 12, 6),
        Arrival(0.0, None, 8, 5, max_tokens=40),
        Arrival(0.01, "a", 7, 1, max_tokens=40, tenant="t"),
        Arrival(0.02, None, 500, 5),  # too long
    ]
    kept = MemorySink()
    workload = Fixed(arrivals, [AdapterShape("a", 9)])
    async with make_engine(tiny) as engine:
        paths: dict[str, str | Path] = {"a": tiny.adapters["rslora"]}
        await asyncio.wait_for(replay(engine, workload, kept, paths=paths, sample_seconds=0.05), 60)
    done = played(kept)
    assert done[:4] == (4, 3, 1, 0)
    records = sorted(kept.requests, key=lambda r: r.request_id)
    assert [(r.prompt_tokens, r.output_tokens) for r in records] == [(12, 6), (8, 5), (7, 1), (500, 0)]
    assert [r.rank for r in records] == [9, 0, 9, 0]
    assert [move.stage for move in kept.moves] == ["disk", "slot"]
    assert all(0 <= r.arrival <= r.ended <= done.seconds for r in records)
