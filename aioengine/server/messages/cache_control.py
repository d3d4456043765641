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
from aioengine.server.context import Call
from aioengine.server.errors import ApiError, invalid
from aioengine.server.messages.api import CacheControl, Content, CountRequest, MessageParam, MessagesRequest
from aioengine.server.messages.read import prompt_of
from aioengine.server.openai.api import Message
from aioengine.server.openai.chat import encode_messages
from aioengine.server.openai.form import plan_tools

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
        text = f"at most {MAX_PINS} blocks may have it, and more do; leave it on the last block of each part "
        raise invalid("cache_control", f"{text}that later requests repeat")
    return found


def _breakpoints(data: MessagesRequest) -> Iterator[Breakpoint]:
    names = ("model", "messages", "system", "tools", "chat_template_kwargs")
    whole = CountRequest(**{name: getattr(data, name) for name in names})
    if data.tool_choice is not None and data.tool_choice.type == "none":
        whole.tool_choice = data.tool_choice  # the tools are not shown

    def at(control: CacheControl | None, **fields: object) -> Iterator[Breakpoint]:
        if control is not None:
            yield Breakpoint(msgspec.structs.replace(whole, **fields), SECONDS[control.ttl or "5m"])

    tools = data.tools or []
    for i, tool in enumerate(tools):
        yield from at(tool.cache_control, tools=tools[: i + 1], system=None, messages=[])
    for system, control in _cuts(data.system or ""):
        yield from at(control, system=system, messages=[])
    for i, message in enumerate(data.messages):
        for content, control in _cuts(message.content):
            cut = MessageParam(role=message.role, content=content)
            yield from at(control, messages=[*data.messages[:i], cut])
    yield from at(data.cache_control)


def _cuts(content: Content) -> Iterator[tuple[Content, CacheControl]]:
    """Yield the content up to each of its breakpoints."""
    for i, block in enumerate(() if isinstance(content, str) else content):
        within = block.content if isinstance(block.content, list) else []
        for own in (block, *within):
            if own.cache_control is not None:
                yield content[: i + 1], own.cache_control


async def find_pins(call: Call, prompt: Sequence[int], wanted: Sequence[Breakpoint]) -> list[CachePin]:
    """Return the pins for a request's breakpoints. One that has no token of the prompt before it is left
    out."""
    config = call.context.engine.config
    if not config.enable_prefix_caching or not config.max_prefix_pins:
        return []
    found = [(await _length(call, prompt, part), seconds) for part, seconds in wanted]
    return [CachePin(tokens=tokens, seconds=seconds) for tokens, seconds in found if tokens]


def hour_tokens(pins: Sequence[CachePin], block_size: int) -> int:
    """Return how many tokens are in whole blocks of a prefix that is kept for an hour."""
    tokens = max((pin.tokens for pin in pins if pin.seconds >= SECONDS["1h"]), default=0)
    return tokens // block_size * block_size


async def _length(call: Call, prompt: Sequence[int], part: CountRequest) -> int:
    """Return how many tokens of the prompt are those of ``part``."""
    chat = prompt_of(part)
    chat.continue_final_message, chat.add_generation_prompt = None, False
    plan = plan_tools(chat.tools, chat.tool_choice)

    async def length(*more: Message) -> int:
        asked = msgspec.structs.replace(chat, messages=[*chat.messages, *more])
        return common(prompt, await encode_messages(call, asked, plan))

    try:
        return await length()
    except (ApiError, RequestInvalid):  # many templates take no chat without a user's turn
        try:
            return min([await length(Message(role="user", content=text)) for text in "ab"])
        except (ApiError, RequestInvalid):
            return 0


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
