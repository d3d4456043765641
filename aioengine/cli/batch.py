"""A batch of requests as JSON lines: parsed in full first, then run together, answered in order."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple, TextIO

import msgspec

from aioengine.cli.generate import register
from aioengine.config import EngineConfig
from aioengine.engine import AsyncEngine
from aioengine.errors import AioEngineError, RequestInvalid
from aioengine.request import Prompt, SamplingParams

_OWN_FIELDS = ("id", "prompt", "messages", "adapter")


class Request(NamedTuple):
    """One line of the input."""

    id: Any
    """The line's "id", or its number from 0."""
    prompt: Prompt
    adapter: str | None
    params: SamplingParams


def parse_lines(lines: Iterable[bytes], defaults: Mapping[str, Any], adapter: str | None) -> list[Request]:
    """Parse every line, so that a mistake is told before a model is loaded.

    ``defaults`` are sampling fields, and ``adapter`` the adapter, of the lines that have none.
    Raises RequestInvalid with the line's number.
    """
    found: list[Request] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                found.append(_parse(line, len(found), defaults, adapter))
            except (msgspec.MsgspecError, RequestInvalid, TypeError) as error:
                raise RequestInvalid(f"standard input, line {number}: {error}") from error
    if not found:
        raise RequestInvalid("no PROMPT is given and standard input has no JSON lines; give one")
    return found


def _parse(line: bytes, index: int, defaults: Mapping[str, Any], adapter: str | None) -> Request:
    fields = msgspec.json.decode(line, type=dict[str, Any])
    sampling = {**defaults, **{k: v for k, v in fields.items() if k not in _OWN_FIELDS}}
    for name in sampling:
        if name not in SamplingParams.__struct_fields__:
            known = ", ".join((*_OWN_FIELDS, *SamplingParams.__struct_fields__))
            raise RequestInvalid(f"unknown field {name!r}; there are {known}")
    if ("prompt" in fields) == ("messages" in fields):
        raise RequestInvalid('give either "prompt" or "messages"')
    if "prompt" in fields:
        prompt: Prompt = msgspec.convert(fields["prompt"], str | list[int])
    else:
        prompt = msgspec.convert(fields["messages"], list[dict[str, Any]])
    return Request(
        id=fields.get("id", index),
        prompt=prompt,
        adapter=msgspec.convert(fields.get("adapter", adapter), str | None),
        params=SamplingParams(**sampling),
    )


async def run_batch(
    config: EngineConfig, adapters: dict[str, str], requests: Sequence[Request], out: TextIO
) -> int:
    """Run the requests and write one line for each, in their order; returns 0, or 1 if some failed.

    At most four times ``max_num_seqs`` requests are in the engine at a time: enough for a policy to
    choose from, and few enough for a batch of any length.
    """
    failed = False
    encoder = msgspec.json.Encoder()
    window = 4 * config.max_num_seqs
    upcoming = iter(requests)
    tasks: deque[asyncio.Task[dict[str, Any]]] = deque()
    async with AsyncEngine(config) as engine:
        register(engine, adapters)
        try:
            while True:
                for request in islice(upcoming, window - len(tasks)):
                    tasks.append(asyncio.create_task(_answer(engine, request)))
                if not tasks:
                    return 1 if failed else 0
                answer = await tasks.popleft()
                failed = failed or "error" in answer
                out.write(encoder.encode(answer).decode() + "\n")
                out.flush()
        finally:
            for task in tasks:
                task.cancel()


async def _answer(engine: AsyncEngine, request: Request) -> dict[str, Any]:
    answer: dict[str, Any] = {"id": request.id, "adapter": request.adapter}
    try:
        out = await engine.complete(request.prompt, request.params, adapter=request.adapter)
    except AioEngineError as error:
        return {**answer, "error": {"type": type(error).__name__, "message": str(error)}}
    answer |= {
        "text": out.text,
        "token_ids": out.token_ids,
        "finish_reason": out.finish_reason,
        "prompt_tokens": len(out.prompt_token_ids),
    }
    return answer if out.logprobs is None else {**answer, "logprobs": out.logprobs}
