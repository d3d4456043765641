"""``/tokenize`` and ``/detokenize``, in vLLM's format."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from aioengine.server.context import Call
from aioengine.server.errors import invalid
from aioengine.server.openai.api import MAX_MESSAGES, MAX_TOOLS, ChatRequest, Message, Strict, TokenId, Tool
from aioengine.server.openai.chat import encode_messages
from aioengine.server.prompts import encode


class TokenizeRequest(Strict, kw_only=True):
    """Either ``prompt`` or ``messages``."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Meta(max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = None
    """For a prompt; true if it is not given. A chat template writes its own."""
    add_generation_prompt: bool | None = None
    """For messages: with the opening of the assistant's next turn; true if it is not given."""
    tools: Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class Tokenized(msgspec.Struct, kw_only=True):
    count: int
    max_model_len: int
    tokens: list[int]


class DetokenizeRequest(Strict, kw_only=True):
    model: str | None = None
    tokens: list[TokenId]


class Detokenized(msgspec.Struct):
    prompt: str


class TokenizerInfo(msgspec.Struct):
    """Facts for clients that make prompts themselves; the rest is in ``/tokenize``."""

    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    chat_template: str | None


async def tokenizer_info(call: Call) -> TokenizerInfo:
    """Special tokens and chat template."""
    tokenizer = call.context.tokenizer
    names = ("bos_token", "eos_token", "pad_token")
    special = {name: tokenizer.special_tokens.get(name) for name in names}
    return TokenizerInfo(**special, chat_template=tokenizer.chat_template)


async def tokenize(call: Call, data: TokenizeRequest) -> Tokenized:
    """Text or messages to token ids."""
    if data.model is not None:  # an adapter has its base model's tokenizer, so it need not exist
        call.adapter_of(data.model)
    if (data.prompt is None) == (data.messages is None):
        raise invalid("prompt", "give either prompt or messages")
    if data.prompt is not None:
        special = data.add_special_tokens is not False
        [tokens] = await encode(call, [data.prompt], special=special, field="prompt")
    else:
        names = ("tools", "chat_template_kwargs", "add_generation_prompt")
        fields = {name: getattr(data, name) for name in names}
        chat = ChatRequest(model="", messages=data.messages or [], **fields)
        tokens = await encode_messages(call, chat, data.tools or ())
    return Tokenized(count=len(tokens), max_model_len=call.context.max_model_len, tokens=tokens)


async def detokenize(call: Call, data: DetokenizeRequest) -> Detokenized:
    """Token ids to text; special ones too."""
    context, tokens, tokenizer = call.context, data.tokens, call.context.tokenizer
    if data.model is not None:
        call.adapter_of(data.model)
    if len(tokens) > context.max_model_len:
        raise invalid("tokens", f"may have at most {context.max_model_len} entries")

    def decode() -> str:
        unknown = tokenizer.first_unknown(tokens)
        if unknown is not None:  # it would only be missing in the text
            where = f"tokens[{unknown}]={tokens[unknown]}"
            raise invalid(where, "the tokenizer has no such token", param="tokens")
        return tokenizer.decode(tokens, False)

    return Detokenized(await context.engine.text_work.run(len(tokens), decode, call.record.owner))
