"""Runs a batch of requests together, and writes the answers in order as JSON lines."""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import islice
from typing import TYPE_CHECKING, Any, BinaryIO

import msgspec

from aioengine.cli.flags import in_flags
from aioengine.cli.generate.request_lines import Request
from aioengine.cli.progress import progress, started
from aioengine.cli.record_flags import RecordFlags
from aioengine.config import EngineConfig
from aioengine.engine import AsyncEngine
from aioengine.errors import AioEngineError
from aioengine.request import for_choice
from aioengine.tasks import together

if TYPE_CHECKING:
    from aioengine.runtime.output import RequestOutput


async def run_batch(
    config: EngineConfig,
    adapters: dict[str, str],
    requests: Sequence[Request],
    out: BinaryIO,
    recording: RecordFlags,
) -> int:
    """Run the requests and write one line for each, in their order. Returns 0, or 1 if some failed.

    At most four times ``max_num_seqs`` requests are in the engine at a time, and no more than ``max_waiting``
    allows. These are enough for a policy to choose from, and few enough for a batch of any length.
    """
    failed = False
    encoder = msgspec.json.Encoder()
    window = min(4 * config.max_num_seqs, config.max_waiting or sys.maxsize)
    upcoming = iter(requests)
    tasks: deque[asyncio.Task[dict[str, Any]]] = deque()
    async with recording.writer() as writer, started(config, adapters) as engine:
        if writer is not None:
            writer.attach(engine)
        try:
            # Nothing is shown beside answers that go to the terminal.
            with progress("requests", lines=False) if not sys.stdout.isatty() else nullcontext() as show:
                ended = 0

                def advance() -> None:
                    nonlocal ended
                    ended += 1
                    if show is not None:
                        show(ended, len(requests), f"{ended}/{len(requests)}")

                while True:
                    for request in islice(upcoming, window - len(tasks)):
                        tasks.append(asyncio.create_task(_answer(engine, request, advance)))
                    if not tasks:
                        return 1 if failed else 0
                    answer = await tasks.popleft()
                    failed = failed or "error" in answer
                    out.write(encoder.encode(answer) + b"\n")
                    out.flush()
        finally:
            for task in tasks:
                task.cancel()


async def _answer(engine: AsyncEngine, request: Request, ended: Callable[[], None]) -> dict[str, Any]:
    answer: dict[str, Any] = {"id": request.id, "adapter": request.adapter}
    try:
        outputs = await _choices(engine, request)
    except AioEngineError as error:
        return {**answer, "error": {"type": type(error).__name__, "message": in_flags(str(error))}}
    finally:
        ended()
    choices = [_choice(out) for out in outputs]
    answer |= choices[0] if request.n == 1 else {"choices": choices}
    answer["prompt_tokens"] = outputs[0].prompt_tokens
    if outputs[0].pooled is not None:
        answer["pooled"] = outputs[0].pooled
    scored = outputs[0].prompt_logprobs  # the same for all choices
    return answer if scored is None else {**answer, "prompt_logprobs": scored}


async def _choices(engine: AsyncEngine, request: Request) -> list[RequestOutput]:
    """Return ``n`` outputs; the first failure cancels the others."""

    async def one(index: int) -> RequestOutput:
        params = for_choice(request.params, index)
        return await engine.complete(request.prompt, params, adapter=request.adapter, **request.scheduling)

    return await together([one(index) for index in range(request.n)])


def _choice(out: RequestOutput) -> dict[str, Any]:
    found = {"text": out.text, "token_ids": out.token_ids, "finish_reason": out.finish_reason}
    return found if out.logprobs is None else {**found, "logprobs": out.logprobs}
