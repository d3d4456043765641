"""``aioengine generate``: one prompt to the terminal, or a batch as JSON lines."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter

from aioengine.cli.flags import EngineFlags
from aioengine.cli.loop import run
from aioengine.errors import AdapterNotFound, RequestInvalid
from aioengine.request import Prompt, SamplingParams

if TYPE_CHECKING:
    from aioengine.config import EngineConfig
    from aioengine.engine import AsyncEngine

_SAMPLING = Group("Sampling", sort_key=5)


@Parameter(name="*", group=_SAMPLING)
@dataclass(frozen=True, kw_only=True)
class SamplingFlags:
    """Sampling values that are not given have the defaults of SamplingParams."""

    max_tokens: int | None = None
    """Most tokens to generate (256)."""
    temperature: float | None = None
    """0, the default, is greedy."""
    top_k: int | None = None
    """Keep the k most likely tokens."""
    top_p: float | None = None
    """Keep the most likely tokens that together have this probability."""
    min_p: float | None = None
    """Drop tokens less likely than this share of the most likely one."""
    repetition_penalty: float | None = None
    """Above 1: make tokens that have occurred less likely."""
    presence_penalty: float | None = None
    """Taken off the logit of each token in the output."""
    frequency_penalty: float | None = None
    """Taken off once for each occurrence."""
    stop: Annotated[list[str] | None, Parameter(negative="")] = None
    """String that ends the output; can be given more than once."""
    ignore_eos: bool | None = None
    """Go on after the end-of-sequence token."""

    def given(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


def generate(
    prompt: str | None = None,
    /,
    *,
    adapter: str | None = None,
    chat: Annotated[bool, Parameter(negative="")] = False,
    system: str | None = None,
    sampling: SamplingFlags | None = None,
    engine: EngineFlags | None = None,
) -> int:
    """Complete a prompt, or JSON lines from standard input.

    Without PROMPT, each line of standard input is a request: {"prompt": ...} or
    {"messages": [...]}, and, if wanted, "id", "adapter" and the fields of SamplingParams, which
    win over the flags. The requests run together; answers come as JSON lines in the order of the
    requests, each with "text" or "error".

    Parameters
    ----------
    prompt
        Text to complete.
    adapter
        Name of a --lora-modules entry, or an adapter's folder.
    chat
        Send PROMPT as a message, through the model's chat template.
    system
        System message; implies --chat.
    """
    flags = engine or EngineFlags()
    config = flags.engine_config()
    adapters = flags.adapters()
    if adapter is not None and adapter not in adapters:
        adapter = _add_folder(adapter, adapters)
    defaults = (sampling or SamplingFlags()).given()
    if prompt is not None:
        message: Prompt = _messages(prompt, system) if chat or system is not None else prompt
        params = SamplingParams(**defaults)
        return run(_one(config, adapters, message, params, adapter))
    from aioengine.cli.batch import parse_lines, run_batch

    requests = parse_lines(sys.stdin.buffer, defaults, adapter)
    return run(run_batch(config, adapters, requests, sys.stdout))


def _messages(prompt: str, system: str | None) -> list[dict[str, Any]]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": prompt}]


def _add_folder(adapter: str, adapters: dict[str, str]) -> str:
    path = Path(adapter)
    if not path.is_dir():
        known = ", ".join(adapters) or "none given"
        raise AdapterNotFound(
            f"no --lora-modules entry of this name ({known}) and no folder of this path",
            name=adapter,
        )
    name = path.resolve().name
    if name in adapters:
        raise RequestInvalid(f"--adapter {adapter}: --lora-modules has a {name!r} too; use its name")
    adapters[name] = str(path)
    return name


async def _one(
    config: EngineConfig,
    adapters: dict[str, str],
    prompt: Prompt,
    params: SamplingParams,
    adapter: str | None,
) -> int:
    from aioengine.engine import AsyncEngine

    async with AsyncEngine(config) as engine:
        register(engine, adapters)
        async for out in engine.generate(prompt, params, adapter=adapter):
            print(out.text_delta, end="", flush=True)
    print()
    return 0


def register(engine: AsyncEngine, adapters: dict[str, str]) -> None:
    for name, path in adapters.items():
        engine.register_adapter(name, path)
