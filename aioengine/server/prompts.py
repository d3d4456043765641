"""From texts and messages to prompts: token ids within the model's context. Owners take turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from aioengine.errors import PromptTooLong
from aioengine.runtime.text_work import EACH, SHORT, size_of_all
from aioengine.server.access_log import RequestRecord
from aioengine.server.context import Context
from aioengine.server.errors import ApiError, invalid

PAIRS_PER_BODY = 2
"""Characters of all pairs of texts in one request, in bodies of the largest size: a long text may be paired
with thousands."""


async def encode(
    context: Context,
    texts: Sequence[str],
    record: RequestRecord,
    *,
    add_special_tokens: bool = True,
    keep: int | None = None,
) -> list[list[int]]:
    """Tokenize each text. With ``keep``, only that many last tokens of each; without, raises ApiError for a
    text that cannot fit."""
    make = _encoder(context, add_special_tokens, keep, field="prompt")
    return await context.engine.text_work.run(size_of_all(texts), lambda: make(texts), record.owner)


async def encode_pairs(
    context: Context, pairs: Sequence[tuple[str, str]], record: RequestRecord
) -> list[list[int]]:
    """Encode pairs of texts as :func:`encode` does single ones. Raises ApiError if they are too long."""
    tokenizer, limit = context.tokenizer, context.max_model_len
    size = sum(len(first) + len(second) for first, second in pairs)
    most = PAIRS_PER_BODY * context.max_body_bytes
    if size > most:
        raise invalid(
            "documents",
            f"they and the query, which is read with each of them, have {size} characters together, and one "
            f"request may have {most}; send fewer documents at a time",
        )

    def make() -> list[list[int]]:
        return _fitting(context, "documents", lambda: tokenizer.encode_pairs(pairs, limit=limit))

    return await context.engine.text_work.run(size + EACH * len(pairs), make, record.owner)


async def encode_chat(
    context: Context,
    messages: list[dict[str, Any]],
    variables: dict[str, Any],
    record: RequestRecord,
    *,
    keep: int | None = None,
) -> list[int]:
    """Render messages by the chat template, and tokenize the result as :func:`encode` does."""
    tokenizer = context.tokenizer
    make = _encoder(context, False, keep, field="messages")
    # Never on the event loop, because a template may take any time. It may write all of the body, tools and
    # arguments of calls included.
    [ids] = await context.engine.text_work.run(
        SHORT + record.body_size,
        lambda: make([tokenizer.render_chat(messages, **variables)]),
        record.owner,
    )
    return ids


def _encoder(
    context: Context, add_special_tokens: bool, keep: int | None, *, field: str
) -> Callable[[Sequence[str]], list[list[int]]]:
    tokenizer, limit = context.tokenizer, context.max_model_len

    def make(texts: Sequence[str]) -> list[list[int]]:
        if keep is not None and keep <= limit:
            return tokenizer.encode_ends(texts, keep, add_special_tokens)
        return _fitting(context, field, lambda: tokenizer.encode_all(texts, add_special_tokens, limit=limit))

    return make


def _fitting(context: Context, field: str, encode: Callable[[], list[list[int]]]) -> list[list[int]]:
    try:
        return encode()
    except PromptTooLong as error:
        raise too_long(context, error.tokens, field=field, at_least=error.at_least) from None


async def texts_of(
    context: Context, prompts: Sequence[list[int]], texts: list[str] | None, record: RequestRecord
) -> list[str]:
    """Return the prompts' texts: the given ones, or the decoded token ids."""
    if texts is not None:
        return texts
    tokenizer = context.tokenizer

    def decode() -> list[str]:  # the engine refuses the ids that are left out
        return [tokenizer.decode([t for t in prompt if 0 <= t < 2**31], False) for prompt in prompts]

    return await context.engine.text_work.run(size_of_all(prompts), decode, record.owner)


def kept(context: Context, keep: int | None, max_tokens: int | None) -> int | None:
    """Return how many last tokens of each prompt ``truncate_prompt_tokens`` keeps; None: all. -1 keeps as
    many as leave room for ``max_tokens``, or for one."""
    if keep is None or keep >= 0:
        return keep
    return max(context.max_model_len - (1 if max_tokens is None else max_tokens), 1)


def last_tokens(prompts: Sequence[list[int]], keep: int | None) -> Sequence[list[int]]:
    """Return the last ``keep`` tokens of each prompt; None: all."""
    return prompts if keep is None else [prompt[-keep:] if keep else [] for prompt in prompts]


def check_prompts(
    context: Context, prompts: Sequence[list[int]], n: int, *, field: str, max_tokens: int | None = None
) -> None:
    """Raise ApiError for prompts that the engine cannot take, with the code that clients know."""
    most = context.settings.max_choices
    if len(prompts) * n > most:
        text = (
            f"{len(prompts)} prompts with {n} choices each are too many; one request may have {most} choices"
        )
        raise invalid("n", text)
    longest = max(map(len, prompts))
    if longest > context.max_model_len - (max_tokens != 0):
        raise too_long(context, longest, field=field)


def too_long(context: Context, tokens: int, *, field: str, at_least: bool = False) -> ApiError:
    has = f"at least {tokens}" if at_least else f"{tokens}"
    text = f"This model's maximum context length is {context.max_model_len} tokens, and the prompt has {has}"
    return ApiError(400, f"{text}: please shorten it", param=field, code="context_length_exceeded")
