"""``aioengine generate``: one prompt to the terminal, or a batch as JSON lines."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

from aioengine.cli.common import CommonFlags
from aioengine.cli.flags import EngineFlags, check_folders
from aioengine.cli.generate.request_lines import Defaults, Request, parse_lines
from aioengine.cli.generate.sampling_flags import RequestFlags, SamplingFlags
from aioengine.cli.loop import run
from aioengine.cli.record_flags import RecordFlags
from aioengine.cli.struct_flags import given
from aioengine.errors import AdapterNotFound, RequestInvalid

if TYPE_CHECKING:
    from aioengine.config import EngineConfig

_REQUEST = Group("Request", sort_key=1)


def generate(
    prompt: Annotated[str | None, Parameter(group=_REQUEST)] = None,
    /,
    *,
    adapter: Annotated[str | None, Parameter(group=_REQUEST)] = None,
    chat: Annotated[bool, Parameter(group=_REQUEST, negative="")] = False,
    system: Annotated[str | None, Parameter(group=_REQUEST)] = None,
    json: Annotated[bool, Parameter(group=_REQUEST, negative="")] = False,
    n: Annotated[int, Parameter(group=_REQUEST)] = 1,
    sampling: SamplingFlags | None = None,
    request: RequestFlags | None = None,
    engine: EngineFlags | None = None,
    recording: RecordFlags | None = None,
    common: CommonFlags | None = None,
) -> int:
    """Complete a prompt, or JSON lines from standard input.

    Without PROMPT, each line of standard input is a request, {"prompt": ...} or {"messages": [...]}. Its
    fields override the flags. Answers come in the same order. --help-all describes all fields.

    Args:
        prompt: Text to complete.
        adapter: Name (see --lora-modules, --adapter-root), folder, or hf:owner/name.
        chat: Send a text prompt as a chat message, through the model's chat template.
        system: System message for requests without one; implies --chat.
        json: Print the answer to PROMPT as a JSON line too.
        n: Answers per request; with PROMPT, needs --json.
    """
    flags = engine or EngineFlags()
    sampling_flags = sampling or SamplingFlags()
    if prompt is not None and not json and (n != 1 or sampling_flags.logprobs is not None):
        raise RequestInvalid("--n and --logprobs with PROMPT: plain text cannot show them; add --json")
    config = flags.engine_config()
    adapters = flags.adapters()
    check_folders(adapters)
    if adapter is not None and adapter not in adapters:
        adapter = _find_adapter(adapter, adapters, config)
    defaults = Defaults(
        adapter=adapter,
        n=n,
        chat=chat,
        system=system,
        sampling=given(sampling_flags),
        scheduling=given(request or RequestFlags()),
    )
    if prompt is None:
        requests = _read_standard_input(defaults)
    else:
        requests = [defaults.request({"prompt": prompt}, 0)]
        if not json:
            return run(_print_text(config, adapters, requests[0], recording or RecordFlags()))
    from aioengine.cli.generate.batch import run_batch

    return run(run_batch(config, adapters, requests, sys.stdout.buffer, recording or RecordFlags()))


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
    path = Path(adapter)
    if not adapter:
        raise RequestInvalid("--adapter '': is empty; give a name, a folder, or hf:owner/name")
    if not path.is_dir():
        if config.lora is not None and config.lora.adapter_root is not None:
            return adapter
        known = ", ".join(adapters) or "none given"
        raise AdapterNotFound(
            f"no --lora-modules entry of this name ({known}) and no folder of this path",
            name=adapter,
        )
    name = path.resolve().name
    if name in adapters:
        raise RequestInvalid(
            f"--adapter {adapter}: --lora-modules already has an adapter {name!r}; use that name"
        )
    adapters[name] = str(path)
    return name


@contextmanager
def _no_failed_loads_logged() -> Iterator[None]:
    """Context in which the log does not have loads that fail: the request's error says the same."""

    def is_other(record: logging.LogRecord) -> bool:
        return "reason" not in getattr(record, "data", {})

    logger = logging.getLogger("aioengine")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


async def _print_text(
    config: EngineConfig, adapters: dict[str, str], request: Request, recording: RecordFlags
) -> int:
    from aioengine.cli.progress import started

    async with recording.writer() as writer, started(config, adapters) as engine:
        if writer is not None:
            writer.attach(engine)
        outputs = engine.generate(
            request.prompt, request.params, adapter=request.adapter, **request.scheduling
        )
        with _no_failed_loads_logged():
            async for out in outputs:
                print(out.text_delta, end="", flush=True)
    print()
    return 0
