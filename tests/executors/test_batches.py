"""Steps on the wire: both sides agree whatever happens, and what is known is not sent again."""

from __future__ import annotations

import random
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.full_sim import FullSim

from aioengine.errors import RequestInvalid
from aioengine.executors.process.wire import Request, Step, StepDecoder, StepEncoder, frame, requests
from aioengine.request import SamplingParams
from aioengine.step import SequenceWork, StepBatch
from aioengine.testing import LIMITS


def over_the_wire(step: Step) -> Step:
    got = requests.decode(frame(Request(7, step))[8:]).message
    assert isinstance(got, Step)
    return got


def plain(batch: StepBatch) -> object:
    return msgspec.json.decode(msgspec.json.encode(batch._replace(sequences=list(batch.sequences))))


def decoded(decoder: StepDecoder, step: Step, masks: Mapping[int, bytes] | None = None) -> StepBatch:
    """What a worker makes of a step, after which it gets these masks."""
    sent: Future[Mapping[int, bytes]] = Future()
    batch = decoder.decode(over_the_wire(step), sent)
    sent.set_result(masks or {})
    return batch


class Number(int):
    """An integer of a class of its own."""


class Both:
    """The two sides, checked against each other with every batch."""

    def __init__(self) -> None:
        self.encoder = StepEncoder()
        self.decoder = StepDecoder()

    def send(self, batch: StepBatch) -> int:
        """Returns the bytes that it took."""
        step = self.encoder.encode(batch)
        assert plain(decoded(self.decoder, step)) == plain(batch._replace(again=False))
        return len(frame(Request(7, step)))


@given(st.integers(0, 2**32 - 1))
@pytest.mark.slow
def test_both_sides_agree_on_every_batch(seed: int) -> None:
    """With prompts in chunks, preemptions, and ends at any time."""
    rng = random.Random(seed)
    sim = FullSim(LIMITS._replace(num_blocks=rng.randint(16, 24)))
    sim.register("a")
    sim.register("b")
    mix = sim.mix("a", "b", weight=0.3)
    both = Both()
    seen = 0
    for _ in range(60):
        if rng.random() < 0.4:
            prompt = rng.choices(range(2, 9), k=rng.randint(1, 30))
            sim.add(rng.choice([None, "a", mix]), prompt=prompt, max_tokens=rng.randint(1, 12))
        if rng.random() < 0.1 and sim.core.requests:
            sim.core.end(rng.choice(list(sim.core.requests.values())), "abort", sim.now)
            sim.take_events()
        while sim.loads:
            sim.finish_load()
        while sim.copies:
            sim.finish_copy()
        if sim.schedule() is not None:
            assert sim.batch is not None
            both.send(sim.batch)
            sim.finish_step()
        for request_id in list(sim.ended)[seen:]:
            both.encoder.forget(request_id)
        seen = len(sim.ended)
        sim.now += 0.01


def work(request_id: str, history: list[int], blocks: list[int], **fields: object) -> SequenceWork:
    defaults: dict[str, object] = {
        "slot": -1,
        "tokens": history[-1:],
        "start": len(history) - 1,
        "sample": True,
        "params": SamplingParams(temperature=0.5, logit_bias={3: 1.0}, stop=["x"]),
        "seed": 2**63 - 1,
        "prompt_len": 1,
    }
    return SequenceWork(request_id, block_table=blocks, history=history, **{**defaults, **fields})  # type: ignore[arg-type]


def test_what_a_step_takes_does_not_grow_with_the_history() -> None:
    both = Both()
    history = list(range(5000))
    blocks = list(range(1000))
    first = both.send(StepBatch(1, [work("r", history, blocks)], [0]))
    history.append(7)
    second = both.send(StepBatch(2, [work("r", history, blocks)], [0]))
    assert first > 10_000
    assert second < 70


floats, integers = st.floats(0.1, 1.0).map(np.float64), st.integers(0, 2**40).map(Number)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            **dict.fromkeys(
                ("temperature", "top_p", "min_p", "presence_penalty"), floats | st.floats(0.1, 1)
            ),
            **dict.fromkeys(("top_k", "seed"), integers | st.integers(0, 2**40)),
            "logit_bias": st.dictionaries(integers, floats, max_size=2),
            "stop": st.text(min_size=1) | st.lists(st.sampled_from(["a", "\ud800", np.str_("b")])),
            "stop_token_ids": st.lists(integers, max_size=2),
            "ignore_eos": st.sampled_from([True, np.True_, None, 1]),
        },
    ),
    st.sampled_from(["r", np.str_("r")]),
    floats | st.just(0.5),
)
def test_whatever_parameters_are_taken_can_be_sent(values: dict[str, Any], name: str, weight: float) -> None:
    """Numbers and texts of other classes are Python's on the other side. (An error here ends the engine.)"""
    try:
        params = SamplingParams(**values)
    except RequestInvalid:
        return
    row = work(name, [1, 2], [0], params=params, seed=params.seed or 0, scale=weight)
    step = over_the_wire(StepEncoder().encode(StepBatch(1, [row], [0, 0])))
    sent = SequenceWork(*step.rows[0])
    assert sent.request_id == "r" and sent.scale == weight
    for key, value in dict(sent.params).items():  # type: ignore[call-overload] # as they are sent
        assert key == "stop" or value == values[key]


def test_what_has_ended_is_forgotten_on_both_sides() -> None:
    both = Both()
    both.send(StepBatch(1, [work("r", [1, 2], [0]), work("s", [3, 4], [1])], [0]))
    both.encoder.forget("r")
    both.encoder.forget("never seen")
    both.send(StepBatch(2, [work("s", [3, 4, 5], [1])], [0]))
    assert len(both.decoder._known) == 1
    both.encoder.forget("s")
    both.send(StepBatch(3, [work("s", [9, 9], [2], seed=5)], [0]))  # another one of that name
    assert len(both.decoder._known) == 1


def test_a_constraint_stays_here_and_its_mask_goes() -> None:
    class Anything:
        def allowed(self, output: object) -> bytes:
            raise AssertionError("the engine asks it, not the encoder")

    encoder, decoder = StepEncoder(), StepDecoder()
    params = SamplingParams(constraint=Anything())
    step = encoder.encode(StepBatch(1, [work("r", [1, 2], [0], params=params)], [0]))
    (row,) = decoded(decoder, step, {0: b"\x05"}).sequences
    assert row.params.constraint is not None
    assert row.params.constraint.allowed([]) == b"\x05"
