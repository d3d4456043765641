"""The time of a request counts from its start, also while its choices wait to begin."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from aioengine.config import EngineConfig
from aioengine.request import SamplingParams, TokenConstraint
from aioengine.runtime.output import RequestOutput
from aioengine.server.access.clients import Identity
from aioengine.server.access_log import RequestRecord
from aioengine.server.answer import Answer
from aioengine.server.context import Call, Context
from aioengine.server.openai.api import GenerationFields
from aioengine.server.openai.form import Form

WAIT = 10.0


class Engine:
    """Notes the deadlines that it is given."""

    def __init__(self, max_waiting_tokens: int) -> None:
        self.config = EngineConfig(model="tiny", max_waiting_tokens=max_waiting_tokens)
        self.now = 100.0
        self.deadlines: list[float | None] = []

    def generate(self, *_: Any, deadline: float | None, **__: Any) -> AsyncGenerator[Any, None]:
        return self._output(deadline)

    async def _output(self, deadline: float | None) -> AsyncGenerator[Any, None]:
        yield await self.complete(deadline=deadline)

    async def complete(self, *_: Any, deadline: float | None, **__: Any) -> RequestOutput:
        self.deadlines.append(deadline)
        self.now += 1.0  # the others wait for it where there is room for one
        return cast(RequestOutput, Output())


class Output:
    logprobs_delta = ()
    pooled = ttft = finish_reason = None
    output_tokens = 1


class Constrained:
    """A form whose constraints take half a second each."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def constraints(
        self, guide: object, tenant: str | None, count: int
    ) -> tuple[Sequence[TokenConstraint | None], Sequence[str]]:
        self._engine.now += 0.5 * count
        return [None] * count, ()


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("deadline", [None, 25.0, 600.0])
@pytest.mark.parametrize("constrained", [False, True])
async def test_waits_before_a_choice_begins_count(
    streams: bool, deadline: float | None, constrained: bool
) -> None:
    engine = Engine(max_waiting_tokens=2)  # so that one is let in at a time

    context = SimpleNamespace(
        engine=engine,
        settings=SimpleNamespace(request_timeout=deadline, served_model_names=("tiny",)),
        model_names=("tiny",),
        new_id=lambda: "a",
        seeds=itertools.count(),
        cache_salt=lambda *_: None,
        guide=None,
    )
    record = RequestRecord(request_id="a", method="POST", path="/v1/completions", identity=Identity())
    answer = Answer(
        Call(cast(Context, context), record, {}, cast(Any, None)),
        GenerationFields(model="tiny"),
        [[1], [2], [3]],
        SamplingParams(max_tokens=1),
        cast(Form, Constrained(engine)) if constrained else None,
        prefix="cmpl-",
        clock=lambda: engine.now,
    )
    began = engine.now
    engine.now += WAIT
    await answer.prepare()
    if streams:
        for index in range(3):
            _ = [output async for output, _ in answer.outputs(index)]
    else:
        await answer.last_outputs()
    assert len(engine.deadlines) == 3
    assert engine.now == began + WAIT + 3 * (1.0 + 0.5 * constrained)
    if deadline is None:
        assert engine.deadlines == [None] * 3
    elif streams:
        waited = [0.5 * 3 * constrained + WAIT + index for index in range(3)]
        assert engine.deadlines == [max(0.001, deadline - seconds) for seconds in waited]
    else:
        assert all(left is not None and left <= deadline - WAIT for left in engine.deadlines)
        assert sorted(engine.deadlines, key=lambda left: -(left or 0)) == engine.deadlines
