"""From texts and messages to prompts: token ids within the model's context. Owners take turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from aioengine.errors import PromptTooLong
from aioengine.runtime.text_work import EACH, size_of_all
from aioengine.server.context import Call, Context
from aioengine.server.errors import ApiError, invalid
from aioengine.server.openai.api import Prompts

PAIRS_PER_BODY = 2
"""Characters of all pairs of texts in one request, in bodies of the largest size: a long text may be paired
with thousands."""


async def prompts_of(call: Call, given: Prompts, *, field: str, most: int, special: bool) -> list[list[int]]:
    """Return the token ids of each prompt that was given as ids, or as text: with ``special`` tokens at its
    ends. Raises ApiError."""
    is_one = isinstance(given, str) or bool(given and isinstance(given[0], int))
    items: Any = [given] if is_one else given
    if len(items) > most:
        raise invalid(field, f"at most {most} prompts")
    kinds = set(map(type, items))
    if kinds == {str}:
        return await encode(call, items, special=special, field=field)
    if kinds == {list}:
        longest = max(map(len, items))
        if longest > call.context.max_model_len:  # before they are looked at one by one
            raise too_long(call.context, longest, field=field)
        if not is_one or set(map(type, given)) == {int}:
            return list(items)
    what = "must be a text, a list of texts, a list of token ids or a list of such lists, not empty"
    raise invalid(field, what)


async def encode(call: Call, texts: Sequence[str], *, special: bool = True, field: str) -> list[list[int]]:
    """Tokenize each text, with ``special`` tokens at its ends. Raises ApiError for one that is too long."""
    tokenizer, limit = call.context.tokenizer, call.context.max_model_len
    size = size_of_all(texts)
    return await encoded(call, field, size, lambda: tokenizer.encode_all(texts, special, limit=limit))


async def encode_pairs(call: Call, pairs: Sequence[tuple[str, str]]) -> list[list[int]]:
    """Encode pairs of texts as :func:`encode` does single ones. Raises ApiError if they are too long."""
    tokenizer, limit = call.context.tokenizer, call.context.max_model_len
    size = sum(len(first) + len(second) for first, second in pairs)
    most = PAIRS_PER_BODY * call.context.max_body_bytes
    if size > most:
        raise invalid(
            "documents",
            f"they and the query, which is read with each of them, have {size} characters together, and one "
            f"request may have {most}; send fewer documents at a time",
        )
    size += EACH * len(pairs)
    return await encoded(call, "documents", size, lambda: tokenizer.encode_all(pairs, limit=limit))


async def encoded(call: Call, field: str, size: int, make: Callable[[], list[list[int]]]) -> list[list[int]]:
    """Return what ``make()`` tokenizes, in turns by ``size``. Raises ApiError if a prompt is too long."""
    try:
        return await call.context.engine.text_work.run(size, make, call.record.owner)
    except PromptTooLong as error:
        raise too_long(call.context, error.tokens, field=field, at_least=error.at_least) from None


async def texts_of(call: Call, given: Prompts, prompts: Sequence[list[int]]) -> list[str]:
    """Return the texts of prompts: as they were given, or decoded."""
    tokenizer = call.context.tokenizer
    texts = [given] if isinstance(given, str) else [text for text in given if isinstance(text, str)]
    if texts:
        return texts

    def decode() -> list[str]:  # the engine refuses the ids that are left out
        return [tokenizer.decode([t for t in prompt if 0 <= t < 2**31], False) for prompt in prompts]

    return await call.context.engine.text_work.run(size_of_all(prompts), decode, call.record.owner)


def check_prompts(
    context: Context, prompts: Sequence[list[int]], n: int, *, field: str, max_tokens: int | None = None
) -> None:
    """Raise ApiError for prompts that the engine cannot take, with the code that clients know."""
    most = context.settings.max_choices
    if len(prompts) * n > most:
        text = f"{len(prompts)} prompts with {n} choices each; one request may have {most} choices"
        raise invalid("n", text)
    longest = max(map(len, prompts))
    if longest > context.max_model_len - (max_tokens != 0):
        raise too_long(context, longest, field=field)


def too_long(context: Context, tokens: int, *, field: str, at_least: bool = False) -> ApiError:
    has = f"at least {tokens}" if at_least else f"{tokens}"
    text = f"This model's maximum context length is {context.max_model_len} tokens, and the prompt has {has}"
    return ApiError(400, f"{text}: please shorten it", param=field, code="context_length_exceeded")
