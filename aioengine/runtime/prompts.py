"""Texts and chats as token ids, without holding up the event loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from aioengine.errors import RequestInvalid
from aioengine.request import Prompt
from aioengine.runtime.text_work import SHORT, TextWork, size_of_json

if TYPE_CHECKING:
    from aioengine.model.text.tokenizer import Tokenizer


async def tokenize(
    prompt: Prompt, owner: str | None, *, limit: int, tokenizer: Tokenizer | None, work: TextWork
) -> list[int]:
    """Tokenize a text, or a chat as the model's template renders it, in ``owner``'s share of ``work``. Raises
    RequestInvalid; PromptTooLong beyond ``limit`` tokens."""
    if not isinstance(prompt, (str, list)):
        raise RequestInvalid(
            f"prompt must be str, list of token ids or list of messages, not {type(prompt).__name__}"
        )
    if tokenizer is None:
        raise RequestInvalid("the model has no tokenizer.json: give the prompt as a list of token ids")
    encode: Callable[[], list[int]]
    if isinstance(prompt, str):
        size, encode = len(prompt), partial(tokenizer.encode, prompt, limit=limit)
    else:
        messages: Any = prompt
        size = SHORT + _size_of_chat(messages, limit)  # never on the loop: a template may take any time
        encode = lambda: tokenizer.encode(tokenizer.render_chat(messages), False, limit=limit)  # noqa: E731
    return await work.run(size, encode, owner)


def _size_of_chat(messages: list[Any], limit: int) -> int:
    """Return the size of a chat, arguments of calls included.

    Raises RequestInvalid if there are more messages, or parts of a message, than a prompt can have tokens,
    because a template's work grows with their number.
    """
    for message in messages[: limit + 1]:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list) and len(content) > limit:
            raise RequestInvalid(
                f"a message has {len(content)} parts, and at most {limit} are allowed: join them"
            )
    if len(messages) > limit:
        raise RequestInvalid(
            f"{len(messages)} messages: at most {limit} are allowed, as many as a prompt may have tokens"
        )
    return size_of_json(messages)
