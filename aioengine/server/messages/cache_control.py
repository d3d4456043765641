"""``cache_control``: the parts of a prompt that its sender wants to be kept for later requests.

A breakpoint is after a tool, a block of the system prompt or a block of a message. The prompt up to it is
found by rendering the chat template for what comes before it: the tokens that this text and the whole prompt
begin with are pinned (:class:`~aioengine.request.CachePin`), and never more. Where the template needs a
user's turn, it is rendered with two that differ, so that only what precedes their texts is common.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple, TypeVar

import msgspec

from aioengine.errors import RequestInvalid
from aioengine.request import MAX_PINS, CachePin
from aioengine.server.access_log import RequestRecord
from aioengine.server.context import Context
from aioengine.server.errors import ApiError
from aioengine.server.messages.api import CacheControl, Content, CountRequest, MessageParam, MessagesRequest
from aioengine.server.messages.read import prompt_of
from aioengine.server.openai.chat import encode_messages
from aioengine.server.openai.chat_api import ChatRequest, Message
from aioengine.server.openai.tools import plan_tools

T = TypeVar("T")

SECONDS = {"5m": 300.0, "1h": 3600.0}


class Breakpoint(NamedTuple):
    """A breakpoint of a request."""

    part: CountRequest
    """The request as far as the breakpoint."""
    seconds: float


def breakpoints(data: MessagesRequest) -> list[Breakpoint]:
    """Return the request's breakpoints in their order. Raises ApiError if there are more than 4."""
    found = list(islice(_breakpoints(data), MAX_PINS + 1))  # each holds a copy of what precedes it
    if len(found) > MAX_PINS:
        raise ApiError(
            400,
            f"cache_control: at most {MAX_PINS} blocks may have it, and more do; leave it on the last block "
            "of each part that later requests repeat",
            param="cache_control",
            code="invalid_value",
        )
    return found


def _breakpoints(data: MessagesRequest) -> Iterator[Breakpoint]:
    whole = CountRequest(
        model=data.model,
        messages=data.messages,
        system=data.system,
        tools=data.tools,
        chat_template_kwargs=data.chat_template_kwargs,
    )
    if data.tool_choice is not None and data.tool_choice.type == "none":
        whole = msgspec.structs.replace(whole, tool_choice=data.tool_choice)  # the tools are not shown
    tools = data.tools or []
    for i, tool in enumerate(tools):
        yield from _at(tool.cache_control, whole, tools=tools[: i + 1], system=None, messages=[])
    for system, control in _cuts(data.system or ""):
        yield from _at(control, whole, system=system, messages=[])
    for i, message in enumerate(data.messages):
        for content, control in _cuts(message.content):
            cut = [*data.messages[:i], MessageParam(role=message.role, content=content)]
            yield from _at(control, whole, messages=cut)
    yield from _at(data.cache_control, whole)


def _cuts(content: Content) -> Iterator[tuple[Content, CacheControl | None]]:
    """Yield the content up to each of its blocks, with the block's ``cache_control``."""
    if not isinstance(content, str):
        for i, block in enumerate(content):
            within = block.content if isinstance(block.content, list) else []
            controls = [block.cache_control, *(inner.cache_control for inner in within)]
            for control in controls:
                if control is not None:
                    yield content[: i + 1], control


def _at(control: CacheControl | None, whole: CountRequest, **fields: object) -> Iterator[Breakpoint]:
    if control is not None:
        seconds = SECONDS[control.ttl or "5m"]
        yield Breakpoint(msgspec.structs.replace(whole, **fields), seconds)


async def find_pins(
    context: Context, prompt: Sequence[int], wanted: Sequence[Breakpoint], record: RequestRecord
) -> list[CachePin]:
    """Return the pins for a request's breakpoints. One that has no token of the prompt before it is left
    out."""
    config = context.engine.config
    if not config.enable_prefix_caching or not config.max_prefix_pins:
        return []
    lengths = [await _length(context, prompt, part, record) for part, _ in wanted]
    return [
        CachePin(tokens=tokens, seconds=seconds)
        for tokens, (_, seconds) in zip(lengths, wanted, strict=True)
        if tokens
    ]


def hour_tokens(pins: Sequence[CachePin], block_size: int) -> int:
    """Return how many tokens are in whole blocks of a prefix that is kept for an hour."""
    return (
        max((pin.tokens for pin in pins if pin.seconds >= SECONDS["1h"]), default=0)
        // block_size
        * block_size
    )


async def _length(context: Context, prompt: Sequence[int], part: CountRequest, record: RequestRecord) -> int:
    """Return how many tokens of the prompt are those of ``part``."""
    chat = prompt_of(part)
    chat.continue_final_message, chat.add_generation_prompt = None, False
    try:
        return common(prompt, await _encode(context, chat, record))
    except (ApiError, RequestInvalid):
        pass  # many templates take no chat without a user's turn
    chats = [
        msgspec.structs.replace(chat, messages=[*chat.messages, Message(role="user", content=text)])
        for text in ("a", "b")
    ]
    try:
        return min([common(prompt, await _encode(context, each, record)) for each in chats])
    except (ApiError, RequestInvalid):
        return 0


async def _encode(context: Context, chat: ChatRequest, record: RequestRecord) -> list[int]:
    return await encode_messages(context, chat, plan_tools(chat.tools, chat.tool_choice), record)


def common(first: Sequence[T], second: Sequence[T]) -> int:
    """Return the length of the longest common prefix, with a number of comparisons of slices that is
    logarithmic in it, because a loop would hold the interpreter for long."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
