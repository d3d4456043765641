"""Runs a batch of requests together, and writes the answers in order as JSON lines."""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import count, islice
from typing import TYPE_CHECKING, Any, BinaryIO

import msgspec

from aioengine.cli.flags import RecordFlags, in_flags
from aioengine.cli.generate.request_lines import Request
from aioengine.cli.progress import progress, started
from aioengine.config import EngineConfig
from aioengine.engine import AsyncEngine
from aioengine.errors import AioEngineError
from aioengine.request import for_choice
from aioengine.tasks import end_tasks, together

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
    window = min(4 * config.max_num_seqs, config.max_waiting or sys.maxsize)
    upcoming, ended = iter(requests), count(1)
    tasks: deque[asyncio.Task[dict[str, Any]]] = deque()
    async with started(config, adapters, record=recording.record) as engine:
        try:
            # Nothing is shown beside answers that go to the terminal.
            with nullcontext() if sys.stdout.isatty() else progress("requests") as show:

                async def answer(request: Request) -> dict[str, Any]:
                    found = await _answer(engine, request)
                    done = next(ended)
                    if show is not None:
                        show(done, len(requests), f"{done}/{len(requests)}")
                    return found

                while True:
                    for request in islice(upcoming, window - len(tasks)):
                        tasks.append(asyncio.create_task(answer(request)))
                    if not tasks:
                        return 1 if failed else 0
                    line = await tasks.popleft()
                    failed = failed or "error" in line
                    out.write(msgspec.json.encode(line) + b"\n")
                    out.flush()
        finally:
            await end_tasks(tasks)


async def _answer(engine: AsyncEngine, request: Request) -> dict[str, Any]:
    answer: dict[str, Any] = {"id": request.id, "adapter": request.adapter}

    async def one(index: int) -> RequestOutput:
        params = for_choice(request.params, index)
        return await engine.complete(request.prompt, params, adapter=request.adapter, **request.scheduling)

    try:
        outputs = await together([one(index) for index in range(request.n)])
    except AioEngineError as error:
        return {**answer, "error": {"type": type(error).__name__, "message": in_flags(str(error))}}
    choices = [_fields(out, ("text", "token_ids", "finish_reason", "logprobs")) for out in outputs]
    answer |= choices[0] if request.n == 1 else {"choices": choices}
    # These are the same for all choices.
    return answer | _fields(outputs[0], ("prompt_tokens", "pooled", "prompt_logprobs"))


def _fields(out: RequestOutput, names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(out, name)) is not None}
