"""An output costs the same however much was delivered before it."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Callable

import pytest

from aioengine.core.state import Request
from aioengine.fleet.gateway.call import Call
from aioengine.fleet.wire import Delta
from aioengine.model.text.detokenizer import TextDelta
from aioengine.request import RequestOptions, SamplingParams, TokenLogprob
from aioengine.runtime.output import OutputStream, RequestOutput
from aioengine.server.answer import Reply
from aioengine.server.openai.api import ChatRequest, CompletionRequest, StreamOptions
from aioengine.server.openai.replies import ChatReply, CompletionReply
from aioengine.testing import Sim

OUTPUTS = 10_000
LARGEST = 8_000
"""Bytes that one output may take; a list of 10,000 tokens takes 80,000."""
PARAMS = SamplingParams(max_tokens=2 * OUTPUTS, logprobs=1)


class Words:
    """A tokenizer's stream of text, in which every token is a word."""

    stopped = None

    def push(self, tokens: list[int], *, look: bool) -> TextDelta:
        return TextDelta("".join(f" {token}" for token in tokens))

    def finish(self) -> str:
        return ""


def logprob(token: int) -> TokenLogprob:
    return TokenLogprob(token, -0.5, ((token, -0.5),))


class OfEngine:
    """Outputs as an engine makes them."""

    def __init__(self) -> None:
        sim = Sim()
        self.request: Request = sim.add(prompt=[5, 6, 7])
        object.__setattr__(self.request, "params", PARAMS)
        self.stream = OutputStream(PARAMS, Words())  # type: ignore[arg-type]
        self.stream.attach(self.request)

    def add(self, token: int) -> None:
        self.request.tokens.append(token)
        self.stream.push([token], [logprob(token)], is_stop=False)

    async def next(self) -> RequestOutput:
        return await self.stream.next()


class OfFleet:
    """Outputs as a fleet's gateway makes them."""

    def __init__(self) -> None:
        self.call = Call(0, "r", [5, 6, 7], PARAMS, RequestOptions(), 0.0)

    def add(self, token: int) -> None:
        self.call.take(Delta(0, [token], f" {token}", logprobs=[logprob(token)]), 0.0)

    async def next(self) -> RequestOutput:
        return await self.call.next()


def replies() -> list[Reply]:
    usage = StreamOptions(include_usage=True, continuous_usage_stats=True)
    fields = CompletionRequest(model="m", prompt="", stream_options=usage, return_token_ids=True, logprobs=1)
    chat = ChatRequest(model="m", messages=[], stream_options=usage, return_token_ids=True, logprobs=True)
    head = {"id": "c", "created": 0, "seed": 0, "model": "m"}
    return [
        ChatReply(head, chat, lambda _: b" 1", [None]),
        CompletionReply(head, fields, lambda _: b" 1", None),
    ]


@pytest.mark.parametrize("source", [OfEngine, OfFleet])
async def test_an_output_takes_no_more_memory_however_long_the_answer_is(
    source: Callable[[], OfEngine | OfFleet],
) -> None:
    outputs = source()
    formats = replies()
    peaks = []
    for token in range(OUTPUTS):
        outputs.add(token)
        watched = token % 1000 == 999
        if watched:
            tracemalloc.start()
        output = await outputs.next()
        for reply in formats:
            reply.events(0, output)
        if watched:
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert max(peaks) < LARGEST, peaks
    assert output.token_ids == list(range(OUTPUTS)) and output.output_tokens == OUTPUTS
    assert output.text == "".join(f" {token}" for token in range(OUTPUTS))
    assert output.logprobs == [logprob(token) for token in range(OUTPUTS)]
    assert (output.prompt_token_ids, output.prompt_tokens) == ([5, 6, 7], 3)


@pytest.mark.parametrize("source", [OfEngine, OfFleet])
async def test_an_output_stays_what_it_was(source: Callable[[], OfEngine | OfFleet]) -> None:
    outputs = source()
    kept = []
    for tokens in ([1], [2, 3], [4]):
        for token in tokens:
            outputs.add(token)
        kept.append(await outputs.next())
    assert [output.token_ids_delta for output in kept] == [[1], [2, 3], [4]]
    assert [output.text_delta for output in kept] == [" 1", " 2 3", " 4"]
    assert [len(output.logprobs_delta) for output in kept] == [1, 2, 1]
    for output in (kept[2], kept[0], kept[1]):  # in any order
        assert output.text == "".join(f" {token}" for token in output.token_ids)
        assert output.logprobs == [logprob(token) for token in output.token_ids]
    assert [output.token_ids for output in kept] == [[1], [1, 2, 3], [1, 2, 3, 4]]
    kept[0].token_ids.append(9)  # its reader's own
    assert kept[2].token_ids == [1, 2, 3, 4]


async def test_the_text_is_made_when_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many tokens a few at a time, so that none holds up the others for long."""
    outputs, made = OfEngine(), list[int]()
    push = Words.push

    def noted(self: Words, tokens: list[int], *, look: bool) -> TextDelta:
        made.append(len(tokens))
        return push(self, tokens, look=look)

    monkeypatch.setattr(Words, "push", noted)
    outputs.add(0)
    assert made == []
    await outputs.next()
    for token in range(1, 201):
        outputs.add(token)
    output = await outputs.next()
    assert output.text == "".join(f" {token}" for token in range(201))
    assert sum(made) == 201 and max(made) <= 64 and len(made) < 6


@pytest.mark.parametrize("count", [1, 7, 64, 1000])
async def test_tokens_may_come_in_rows(count: int) -> None:
    """All of their text is there, however many come at a time and whenever it is looked at."""
    request: Request = Sim().add(prompt=[5, 6, 7])
    stream = OutputStream(SamplingParams(max_tokens=2000), Words())  # type: ignore[arg-type]
    stream.attach(request)
    last = asyncio.ensure_future(stream.last())
    await asyncio.sleep(0)
    assert not stream.waits_for_end, "its text is made as the tokens come"
    for first in range(0, 1000, count):
        tokens = list(range(first, min(first + count, 1000)))
        request.tokens += tokens
        assert stream.push(tokens, (), is_stop=False) is None
        if first % 3 == 0:
            assert stream.so_far().text == "".join(f" {token}" for token in range(tokens[-1] + 1))
    stream.end("abort", None)
    assert (await last).text == "".join(f" {token}" for token in range(1000))
