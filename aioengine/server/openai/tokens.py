"""``/tokenize`` and ``/detokenize``, in vLLM's format."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from litestar import Request, get, post
from litestar.handlers import HTTPRouteHandler
from litestar.params import JSONBody
from msgspec import Meta

from aioengine.server.context import Context
from aioengine.server.errors import ApiError
from aioengine.server.framework import RESPONSES, record_of
from aioengine.server.openai.api import TokenId
from aioengine.server.openai.chat import to_template, tools_to_template
from aioengine.server.openai.chat_api import MAX_MESSAGES, MAX_TOOLS, CustomTool, Message, Tool
from aioengine.server.openai.logprobs import TokenBytes
from aioengine.server.openai.tools import plan_tools

if TYPE_CHECKING:
    from aioengine.model.text.tokenizer import Tokenizer


class TokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Either ``prompt`` or ``messages``."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Meta(max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = None
    """For a prompt; true if it is not given. A chat template writes its own."""
    add_generation_prompt: bool | None = None
    """For messages: with the opening of the assistant's next turn; true if it is not given."""
    tools: Annotated[list[Tool | CustomTool], Meta(max_length=MAX_TOOLS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class Tokenized(msgspec.Struct, kw_only=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
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


def token_routes(context: Context) -> list[HTTPRouteHandler]:
    @get("/tokenizer_info", responses=RESPONSES, summary="Special tokens and chat template")
    async def tokenizer_info() -> TokenizerInfo:
        special, template = context.tokenizer.special_tokens, context.tokenizer.chat_template
        return TokenizerInfo(
            special.get("bos_token"), special.get("eos_token"), special.get("pad_token"), template
        )

    @post("/tokenize", status_code=200, responses=RESPONSES, summary="Text or messages to token ids")
    async def tokenize(data: JSONBody[TokenizeRequest], request: Request[Any, Any, Any]) -> Tokenized:
        _check_model(context, data.model, request)
        record = record_of(request)
        owner = record.owner
        if (data.prompt is None) == (data.messages is None):
            raise ApiError(
                400, "prompt: give either prompt or messages", param="prompt", code="invalid_value"
            )
        if data.prompt is not None:
            special = data.add_special_tokens is not False
            [tokens] = await context.encode([data.prompt], owner=owner, add_special_tokens=special)
        else:
            variables = dict(data.chat_template_kwargs or {})
            variables["add_generation_prompt"] = data.add_generation_prompt is not False
            if data.tools:
                variables["tools"] = tools_to_template(plan_tools(data.tools).tools)
            variables.pop("messages", None)
            tokens = await context.encode_chat(to_template(data.messages or []), variables, record=record)
        strings = None
        if data.return_token_strs:
            token_bytes = context.token_bytes()
            work = context.engine.text_work
            strings = await work.run(len(tokens), lambda: _strings(tokens, token_bytes), owner)
        return Tokenized(
            count=len(tokens),
            max_model_len=context.engine.plan.max_model_len,
            tokens=tokens,
            token_strs=strings,
        )

    @post("/detokenize", status_code=200, responses=RESPONSES, summary="Token ids to text")
    async def detokenize(data: JSONBody[DetokenizeRequest], request: Request[Any, Any, Any]) -> Detokenized:
        _check_model(context, data.model, request)
        limit = context.engine.plan.max_model_len
        if len(data.tokens) > limit:
            raise ApiError(
                400, f"tokens: may have at most {limit} entries", param="tokens", code="invalid_value"
            )
        work = context.engine.text_work
        decode = partial(_decode, context.tokenizer, data.tokens)
        return Detokenized(await work.run(len(data.tokens), decode, record_of(request).owner))

    return [tokenizer_info, tokenize, detokenize]


def _strings(tokens: list[int], token_bytes: TokenBytes) -> list[str]:
    return [token_bytes(token).decode(errors="replace") for token in tokens]


def _decode(tokenizer: Tokenizer, tokens: list[int]) -> str:
    """Return the text of tokens, special ones too. Raises ApiError for an id that stands for no token, which
    would only be missing in the text."""
    unknown = tokenizer.first_unknown(tokens)
    if unknown is not None:
        message = f"tokens[{unknown}]={tokens[unknown]}: the tokenizer has no such token"
        raise ApiError(400, message, param="tokens", code="invalid_value")
    return tokenizer.decode(tokens, False)


def _check_model(context: Context, model: str | None, request: Request[Any, Any, Any]) -> None:
    """Raise ApiError if the key may not use ``model``. An adapter has its base model's tokenizer, so whether
    it exists is not checked."""
    if model is not None:
        context.adapter_of(model, record_of(request).identity)
