"""``aioengine generate``: one prompt to the terminal, or a batch as JSON lines."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from aioengine.cli.flags import EngineFlags, RecordFlags, Switch, check_folders
from aioengine.cli.generate.batch import run_batch
from aioengine.cli.generate.request_lines import Defaults, Request, parse_lines
from aioengine.cli.loop import run
from aioengine.cli.progress import started
from aioengine.cli.struct_flags import FieldsOf, Flags, flag_set, given
from aioengine.config import EngineConfig
from aioengine.errors import AdapterNotFound, RequestInvalid
from aioengine.request import RequestOptions, SamplingParams


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
        adapters[name] = adapter
        return name
    if not adapter:
        raise RequestInvalid("--adapter '': is empty; give a name, a folder, or hf:owner/name")
    path = Path(adapter)
    if path.is_dir():
        name = path.resolve().name
        if name in adapters:
            raise RequestInvalid(
                f"--adapter {adapter}: --lora-modules already has an adapter {name!r}; use that name"
            )
        adapters[name] = str(path)
        return name
    if config.lora is not None and config.lora.adapter_root is not None:
        return adapter
    known = ", ".join(adapters) or "none given"
    raise AdapterNotFound(
        f"no --lora-modules entry of this name ({known}) and no folder of this path", name=adapter
    )


async def _print_text(
    config: EngineConfig, adapters: dict[str, str], request: Request, recording: RecordFlags
) -> int:
    def is_other(record: logging.LogRecord) -> bool:
        """Whether a record is not of a failed load, about which the request's error says the same."""
        return "reason" not in getattr(record, "data", {})

    async with started(config, adapters, record=recording.record) as engine:
        logger = logging.getLogger("aioengine")
        logger.addFilter(is_other)
        try:
            async for out in engine.generate(
                request.prompt, request.params, adapter=request.adapter, **request.scheduling
            ):
                print(out.text_delta, end="", flush=True)
        finally:
            logger.removeFilter(is_other)
    print()
    return 0
