"""``/v1/completions``: prompts in, text out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec
from litestar import Request, post
from litestar.handlers import HTTPRouteHandler
from litestar.params import JSONBody
from litestar.response import Response

from aioengine.request import RequestOutput
from aioengine.server.context import Context
from aioengine.server.errors import ApiError, unsupported
from aioengine.server.framework import RESPONSES, Handled, record_of
from aioengine.server.openai.api import Usage
from aioengine.server.openai.completions_api import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from aioengine.server.openai.constraints import wanted_constraint
from aioengine.server.openai.logprobs import TokenBytes, completion_logprobs, new_logprobs
from aioengine.server.openai.sampling import sampling_params
from aioengine.server.streaming import GenerationResponse

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""


def completion_routes(context: Context) -> list[HTTPRouteHandler]:
    @post("/v1/completions", status_code=200, responses=RESPONSES, summary="Complete a prompt")
    async def completions(
        data: JSONBody[CompletionRequest], request: Request[Any, Any, Any]
    ) -> Response[Completion]:
        record = record_of(request)
        _refuse_unsupported(data)
        prompts = await _prompts(context, data)
        context.check_prompts(prompts, data.n or 1, field="prompt")
        params = sampling_params(
            data, max_tokens=data.max_tokens or DEFAULT_MAX_TOKENS, logprobs=data.logprobs, constraint=None
        )
        generation = await context.generation(
            data, prompts, params, wanted_constraint(data, data.response_format), record, prefix="cmpl"
        )
        reply = CompletionReply(
            generation.request_id,
            data.model,
            len(generation),
            token_bytes=None if data.logprobs is None else context.token_bytes(),
            include_usage=bool(data.stream_options and data.stream_options.include_usage),
        )
        stream = bool(data.stream)
        return Handled(
            GenerationResponse(generation, reply, stream=stream, settings=context.settings, record=record)
        )

    return [completions]


def _refuse_unsupported(data: CompletionRequest) -> None:
    if data.echo:
        raise unsupported("echo", "the prompt cannot be sent back")
    if data.suffix:
        raise unsupported("suffix", "text can only be continued, not filled in")
    if data.best_of is not None and data.best_of != (data.n or 1):
        raise unsupported("best_of", "must be n: every choice is sent back")


async def _prompts(context: Context, data: CompletionRequest) -> list[list[int]]:
    """Token ids of each prompt."""
    prompt = [data.prompt] if isinstance(data.prompt, str) else data.prompt
    if len(prompt) > context.settings.max_choices and not isinstance(prompt[0], int):
        raise ApiError(400, f"prompt: at most {context.settings.max_choices} prompts", param="prompt")
    if len(prompt) >= context.engine.plan.max_model_len and isinstance(prompt[0], int):
        raise context.too_long(len(prompt), field="prompt")  # before they are looked at one by one
    found: Any = prompt
    kinds = set(map(type, prompt))
    if kinds == {str}:
        return await context.encode(found)
    if kinds == {int}:
        return [found]
    if kinds == {list}:
        return list(found)
    raise ApiError(
        400,
        "prompt: must be a text, a list of texts, a list of token ids or a list of such lists, not empty",
        param="prompt",
        code="invalid_value",
    )


class _Choice:
    """How far a choice has been told."""

    def __init__(self) -> None:
        self.logprobs = 0
        self.offset = 0


class CompletionReply:
    """``token_bytes`` is None if no log-probabilities are wanted."""

    def __init__(
        self,
        completion_id: str,
        model: str,
        count: int,
        *,
        token_bytes: TokenBytes | None,
        include_usage: bool,
    ) -> None:
        self._id = completion_id
        self._model = model
        self._created = int(time.time())
        self._choices = [_Choice() for _ in range(count)]
        self._token_bytes = token_bytes
        self._include_usage = include_usage
        self._encode = msgspec.json.Encoder().encode

    def chunk(self, index: int, output: RequestOutput) -> bytes | None:
        logprobs = self._logprobs(index, output)
        if not output.text_delta and not output.finished and logprobs is None:
            return None
        choice = CompletionChoice(
            index=index,
            text=output.text_delta,
            logprobs=logprobs,
            finish_reason=output.finish_reason,
            stop_reason=output.stop_reason,
        )
        return self._completion([choice], None)

    def usage_chunk(self, usage: Usage) -> bytes | None:
        return self._completion([], usage) if self._include_usage else None

    def whole(self, outputs: Sequence[RequestOutput], usage: Usage) -> bytes:
        choices = [
            CompletionChoice(
                index=index,
                text=output.text,
                logprobs=self._logprobs(index, output),
                finish_reason=output.finish_reason,
                stop_reason=output.stop_reason,
            )
            for index, output in enumerate(outputs)
        ]
        return self._completion(choices, usage)

    def _completion(self, choices: list[CompletionChoice], usage: Usage | None) -> bytes:
        return self._encode(
            Completion(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage)
        )

    def _logprobs(self, index: int, output: RequestOutput) -> CompletionLogprobs | None:
        if self._token_bytes is None:
            return None
        told = self._choices[index]
        entries = new_logprobs(output, told.logprobs)
        told.logprobs += len(entries)
        result, told.offset = completion_logprobs(entries, self._token_bytes, told.offset)
        return result
