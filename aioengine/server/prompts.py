"""From texts and messages to prompts: token ids within the model's context. Owners take turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from aioengine.errors import PromptTooLong
from aioengine.runtime.text_work import EACH, SHORT, size_of_all
from aioengine.server.context import Call, Context
from aioengine.server.errors import ApiError, invalid

PAIRS_PER_BODY = 2
"""Characters of all pairs of texts in one request, in bodies of the largest size: a long text may be paired
with thousands."""
NO_PROMPT = "must be a text, a list of texts, a list of token ids or a list of such lists, not empty"


async def encode(call: Call, texts: Sequence[str], *, special: bool = True, field: str) -> list[list[int]]:
    """Tokenize each text, with ``special`` tokens at its ends. Raises ApiError for one that is too long."""
    tokenizer, limit = call.context.tokenizer, call.context.max_model_len
    make = _fitting(call.context, field, lambda: tokenizer.encode_all(texts, special, limit=limit))
    return await call.context.engine.text_work.run(size_of_all(texts), make, call.record.owner)


async def encode_pairs(call: Call, pairs: Sequence[tuple[str, str]]) -> list[list[int]]:
    """Encode pairs of texts as :func:`encode` does single ones. Raises ApiError if they are too long."""
    context = call.context
    tokenizer, limit = context.tokenizer, context.max_model_len
    size = sum(len(first) + len(second) for first, second in pairs)
    most = PAIRS_PER_BODY * context.max_body_bytes
    if size > most:
        raise invalid(
            "documents",
            f"they and the query, which is read with each of them, have {size} characters together, and one "
            f"request may have {most}; send fewer documents at a time",
        )
    make = _fitting(context, "documents", lambda: tokenizer.encode_pairs(pairs, limit=limit))
    return await context.engine.text_work.run(size + EACH * len(pairs), make, call.record.owner)


async def encode_chat(call: Call, messages: list[dict[str, Any]], variables: dict[str, Any]) -> list[int]:
    """Render messages by the chat template, and tokenize the result as :func:`encode` does."""
    tokenizer, limit = call.context.tokenizer, call.context.max_model_len

    def encoded() -> list[list[int]]:
        return tokenizer.encode_all([tokenizer.render_chat(messages, **variables)], False, limit=limit)

    # Never on the event loop, because a template may take any time. It may write all of the body, tools and
    # arguments of calls included.
    size, make = SHORT + call.record.body_size, _fitting(call.context, "messages", encoded)
    [ids] = await call.context.engine.text_work.run(size, make, call.record.owner)
    return ids


def _fitting(
    context: Context, field: str, encode: Callable[[], list[list[int]]]
) -> Callable[[], list[list[int]]]:
    def fitting() -> list[list[int]]:
        try:
            return encode()
        except PromptTooLong as error:
            raise too_long(context, error.tokens, field=field, at_least=error.at_least) from None

    return fitting


async def texts_of(call: Call, prompts: Sequence[list[int]]) -> list[str]:
    """Decode prompts that were given as token ids."""
    tokenizer = call.context.tokenizer

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
