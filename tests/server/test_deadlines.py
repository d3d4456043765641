"""The time of a request counts from its start, also while its choices wait to begin."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, cast

import pytest

from aioengine.config import EngineConfig
from aioengine.request import RequestOptions, SamplingParams, TokenConstraint
from aioengine.runtime.client import EngineClient
from aioengine.runtime.output import RequestOutput
from aioengine.server.access_log import RequestRecord
from aioengine.server.generation import Generation

WAIT = 10.0


class Engine:
    """Notes the deadlines that it is given."""

    def __init__(self, max_waiting_tokens: int) -> None:
        self.config = EngineConfig(model="tiny", max_waiting_tokens=max_waiting_tokens)
        self.now = 100.0
        self.deadlines: list[float | None] = []

    def generate(self, *_: Any, options: RequestOptions, **__: Any) -> AsyncGenerator[Any, None]:
        return self._output(options.deadline)

    async def _output(self, deadline: float | None) -> AsyncGenerator[Any, None]:
        yield await self.complete(options=RequestOptions(deadline=deadline))

    async def complete(self, *_: Any, options: RequestOptions, **__: Any) -> RequestOutput:
        self.deadlines.append(options.deadline)
        self.now += 1.0  # the others wait for it where there is room for one
        return cast(RequestOutput, Output())


class Output:
    logprobs_delta = ()
    pooled = ttft = finish_reason = None
    output_tokens = 1


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("deadline", [None, 25.0, 600.0])
@pytest.mark.parametrize("constrained", [False, True])
async def test_waits_before_a_choice_begins_count(
    streams: bool, deadline: float | None, constrained: bool
) -> None:
    engine = Engine(max_waiting_tokens=2)  # so that one is let in at a time

    async def turn() -> None:
        engine.now += WAIT

    async def constrain() -> TokenConstraint:
        engine.now += 0.5
        return cast(TokenConstraint, None)

    generation = Generation(
        cast(EngineClient, engine),
        "a",
        [[1], [2], [3]],
        [SamplingParams(max_tokens=1)] * 3,
        RequestOptions(deadline=deadline),
        RequestRecord(request_id="a", method="POST", path="/v1/completions"),
        turn=turn,
        constrain=constrain if constrained else None,
        clock=lambda: engine.now,
    )
    began = engine.now
    await generation.prepare()
    if streams:
        for index in range(3):
            _ = [output async for output in generation.outputs(index)]
    else:
        await generation.last_outputs()
    assert len(engine.deadlines) == 3
    assert engine.now == began + 3 * (WAIT + 1.0 + 0.5 * constrained)
    if deadline is None:
        assert engine.deadlines == [None] * 3
    elif streams:
        waited = [0.5 * 3 * constrained + WAIT * (index + 1) + index for index in range(3)]
        assert engine.deadlines == [max(0.001, deadline - seconds) for seconds in waited]
    else:  # all have waited for their turns at once
        assert all(left is not None and left <= deadline - WAIT for left in engine.deadlines)
        assert sorted(engine.deadlines, key=lambda left: -(left or 0)) == engine.deadlines
