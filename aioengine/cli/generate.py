"""``aioengine generate``: one prompt to the terminal, or a batch of requests as JSON lines."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import msgspec

from aioengine.cli.flags import EngineFlags, RecordFlags, Switch, check_folders, in_flags
from aioengine.cli.loop import run
from aioengine.cli.progress import progress, started
from aioengine.cli.request_lines import Defaults, Request, parse_lines
from aioengine.cli.struct_flags import FieldsOf, Flags, flag_set, given
from aioengine.config import EngineConfig
from aioengine.engine import AsyncEngine
from aioengine.errors import AdapterNotFound, AioEngineError, RequestInvalid
from aioengine.request import RequestOptions, SamplingParams, for_choice
from aioengine.tasks import end_tasks, together

if TYPE_CHECKING:
    from aioengine.runtime.output import RequestOutput


@flag_set(
    "Sampling",
    5,
    FieldsOf(SamplingParams, left_out=("logit_bias", "seed", "prompt_logprobs", "pooling", "constraint")),
    shown=("max_tokens", "temperature", "top_p", "stop", "logprobs"),
)
class SamplingFlags(Flags):
    """Flags for sampling. Those that are not given have the defaults of SamplingParams."""


@flag_set("Scheduling", 6, FieldsOf(RequestOptions, only=("priority", "deadline", "tenant")), shown=())
class SchedulingFlags(Flags):
    """Flags with the scheduling arguments of requests, for the policies that look at them."""


def generate(
    prompt: str | None = None,
    /,
    *,
    adapter: str | None = None,
    chat: Switch = False,
    system: str | None = None,
    json: Switch = False,
    n: int = 1,
    sampling: SamplingFlags = SamplingFlags(),
    scheduling: SchedulingFlags = SchedulingFlags(),
    engine: EngineFlags = EngineFlags(),
    recording: RecordFlags = RecordFlags(),
) -> int:
    """Complete a prompt, or JSON lines from standard input.

    Without PROMPT, each line of standard input is a request, {"prompt": ...} or {"messages": [...]}. Its
    fields (docs/configuration.md) override the flags. Answers come in the same order.

    Args:
        prompt: Text to complete.
        adapter: Name (see --lora-modules, --adapter-root), folder, or hf:owner/name.
        chat: Send a text prompt as a chat message, through the model's chat template.
        system: System message for requests without one; implies --chat.
        json: Print the answer to PROMPT as a JSON line too.
        n: Answers per request; with PROMPT, needs --json.
    """
    params = given(sampling)
    if prompt is not None and not json and (n != 1 or "logprobs" in params):
        raise RequestInvalid("--n and --logprobs with PROMPT: plain text cannot show them; add --json")
    config, adapters = engine.engine_config(), engine.adapters()
    check_folders(adapters)
    if adapter is not None and adapter not in adapters:
        adapter = _find_adapter(adapter, adapters, config)
    fields = {"adapter": adapter, "n": n, **params, **given(scheduling)}
    defaults = Defaults(fields=fields, chat=chat, system=system)
    if prompt is None:
        requests = _read_standard_input(defaults)
    else:
        requests = [defaults.request({"prompt": prompt}, 0)]
        if not json:
            return run(_print_text(config, adapters, requests[0], recording))
    return run(run_batch(config, adapters, requests, sys.stdout.buffer, recording))


def _read_standard_input(defaults: Defaults) -> list[Request]:
    if sys.stdin is None or sys.stdin.isatty():
        raise RequestInvalid(
            "no PROMPT is given, and no JSON lines on standard input; give either: "
            'aioengine generate "Once upon", or aioengine generate < requests.jsonl'
        )
    try:
        return parse_lines(sys.stdin.buffer, defaults)
    except OSError as error:
        raise RequestInvalid(f"cannot read standard input: {error.strerror}") from error


def _find_adapter(adapter: str, adapters: dict[str, str], config: EngineConfig) -> str:
    """Return the adapter's name in the engine; a folder or a Hub id is added to ``adapters``."""
    if adapter.startswith("hf:"):
        name = adapter.removeprefix("hf:").split("@")[0]
    elif adapter and Path(adapter).is_dir():
        name = Path(adapter).resolve().name
    elif adapter and config.lora is not None and config.lora.adapter_root is not None:
        return adapter
    else:
        known = ", ".join(adapters) or "none given"
        raise AdapterNotFound(
            f"no --lora-modules entry of this name ({known}) and no folder of this path", name=adapter
        )
    if adapters.setdefault(name, adapter) != adapter:
        raise RequestInvalid(f"--adapter {adapter}: --lora-modules has another adapter {name!r}")
    return name


async def _print_text(
    config: EngineConfig, adapters: dict[str, str], request: Request, recording: RecordFlags
) -> int:
    async with started(config, adapters, record=recording.record) as engine:
        async for out in engine.generate(request.prompt, request.params, **request.options):
            print(out.text_delta, end="", flush=True)
    print()
    return 0


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
    turns = asyncio.Semaphore(min(4 * config.max_num_seqs, config.max_waiting or sys.maxsize))
    total, failed = len(requests), False
    async with started(config, adapters, record=recording.record) as engine:

        async def answer(request: Request) -> dict[str, Any]:
            async with turns:
                return await _answer(engine, request)

        tasks = [asyncio.create_task(answer(request)) for request in requests]
        try:
            # Nothing is shown beside answers that go to the terminal.
            with nullcontext() if sys.stdout.isatty() else progress("requests") as show:
                for done, task in enumerate(tasks, start=1):
                    line = await task
                    failed = failed or "error" in line
                    out.write(msgspec.json.encode(line) + b"\n")
                    out.flush()
                    if show is not None:
                        show(done, total, f"{done}/{total}")
        finally:
            await end_tasks(tasks)
    return 1 if failed else 0


async def _answer(engine: AsyncEngine, request: Request) -> dict[str, Any]:
    answer: dict[str, Any] = {"id": request.id, "adapter": request.adapter}

    async def one(index: int) -> RequestOutput:
        params = for_choice(request.params, index)
        return await engine.complete(request.prompt, params, **request.options)

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
