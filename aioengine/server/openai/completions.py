"""``/v1/completions``: prompts in, text out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from sys import getsizeof
from typing import Any

import msgspec
from litestar import Request, post
from litestar.handlers import HTTPRouteHandler
from litestar.params import JSONBody
from litestar.response import Response

from aioengine.request import TokenLogprob
from aioengine.runtime.output import RequestOutput
from aioengine.server.context import Context
from aioengine.server.errors import ApiError, unsupported
from aioengine.server.framework import RESPONSES, Handled, record_of
from aioengine.server.openai import completions_api
from aioengine.server.openai.api import Usage
from aioengine.server.openai.constraints import wanted_form
from aioengine.server.openai.logprobs import (
    TextOffsets,
    TokenBytes,
    completion_logprobs,
    echoed_logprobs,
    prompt_logprobs,
)
from aioengine.server.openai.sampling import last_tokens, sampling_params
from aioengine.server.streaming import DONE, ReplyOptions, event

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""


def completion_routes(context: Context) -> list[HTTPRouteHandler]:
    @post("/v1/completions", status_code=200, responses=RESPONSES, summary="Complete a prompt")
    async def completions(
        data: JSONBody[completions_api.CompletionRequest], request: Request[Any, Any, Any]
    ) -> Response[completions_api.Completion]:
        record = record_of(request)
        if data.suffix:
            raise unsupported("suffix", "text can only be continued, not filled in")
        defaults = await context.defaults()
        max_tokens = defaults.bounded(DEFAULT_MAX_TOKENS) if data.max_tokens is None else data.max_tokens
        keep = context.kept(data.truncate_prompt_tokens, max_tokens)
        prompts, texts = await _prompts(context, data, keep, record.owner)
        if keep is not None:
            prompts, texts = last_tokens(prompts, keep), None
        context.check_prompts(prompts, data.n or 1, max_tokens=max_tokens, field="prompt")
        params = sampling_params(
            data,
            defaults,
            max_tokens=max_tokens,
            logprobs=_count(data.logprobs),
            prompt_logprobs=_of_prompt(data, max_tokens),
        )
        generation = context.generation(
            data,
            prompts,
            params,
            wanted_form(data, context.settings.schemas, data.response_format),
            record,
            prefix="cmpl-",
        )
        echoed = await context.texts_of(prompts, texts, owner=record.owner) if data.echo else None
        reply = CompletionReply(
            generation.reply_id,
            generation.seed,
            ReplyOptions.of(data),
            len(generation),
            logprobs=_count(data.logprobs),
            echoed=echoed,
            token_bytes=context.token_bytes(),
        )
        kept = sum(map(getsizeof, echoed or ()))
        return Handled(context, generation, reply, stream=data.stream, record=record, kept=kept)

    return [completions]


def _count(logprobs: int | bool | None) -> int | None:
    return None if logprobs is None or logprobs is False else int(logprobs)


def _of_prompt(data: completions_api.CompletionRequest, max_tokens: int) -> int | None:
    """Return the number of prompt log-probabilities that the engine must compute."""
    wanted = [data.prompt_logprobs]
    if data.echo:
        wanted += [_count(data.logprobs), 0 if max_tokens == 0 else None]
    return max((count for count in wanted if count is not None), default=None)


async def _prompts(
    context: Context, data: completions_api.CompletionRequest, keep: int | None, owner: str | None
) -> tuple[list[list[int]], list[str] | None]:
    """Return the token ids of each prompt, and the texts if the prompts were given as text."""
    prompt = [data.prompt] if isinstance(data.prompt, str) else data.prompt
    if len(prompt) > context.settings.max_choices and not isinstance(prompt[0], int):
        raise ApiError(400, f"prompt: at most {context.settings.max_choices} prompts", param="prompt")
    if len(prompt) > context.engine.plan.max_model_len and isinstance(prompt[0], int):
        if keep is None:
            raise context.too_long(len(prompt), field="prompt")  # before they are looked at one by one
        prompt = prompt[-context.engine.plan.max_model_len :]
    found: Any = prompt
    kinds = set(map(type, prompt))
    if kinds == {str}:
        tokens = await context.encode(
            found,
            owner=owner,
            add_special_tokens=data.add_special_tokens is not False,
            keep=keep,
        )
        return tokens, found
    if kinds == {int}:
        return [found], None
    if kinds == {list}:
        return list(found), None
    raise ApiError(
        400,
        "prompt: must be a text, a list of texts, a list of token ids or a list of such lists, not empty",
        param="prompt",
        code="invalid_value",
    )


class _Choice:
    """Progress of a choice's reply."""

    def __init__(self, prompt: str | None) -> None:
        self.prompt = prompt
        """Data to send before its answer."""
        self.offsets = TextOffsets(begin=len(prompt or ""))
        self.begun = False


class CompletionReply:
    """The reply of a completion. ``echoed`` has the prompts' texts if they precede the answers."""

    def __init__(
        self,
        completion_id: str,
        seed: int | None,
        options: ReplyOptions,
        count: int,
        *,
        logprobs: int | None,
        echoed: Sequence[str] | None,
        token_bytes: TokenBytes,
    ) -> None:
        self._id = completion_id
        self._seed = seed
        self._options = options
        self._created = int(time.time())
        self._logprobs = logprobs
        texts = [None] if echoed is None else echoed
        self._choices = [_Choice(texts[index * len(texts) // count]) for index in range(count)]
        self._token_bytes = token_bytes
        self._encode = msgspec.json.Encoder().encode

    def events(self, index: int, output: RequestOutput) -> bytes | None:
        choice = self._choice(index, output, output.text_delta)
        if not choice.text and not output.finished and choice.logprobs is None and not choice.token_ids:
            return None
        return event(self._completion([choice], self._options.usage_so_far(output)))

    def last_events(self, usage: Usage) -> bytes:
        return event(self._completion([], usage)) + DONE if self._options.include_usage else DONE

    def failure(self, error: ApiError) -> bytes:
        return event(error.body) + DONE

    def whole(self, outputs: Sequence[RequestOutput], usage: Usage) -> bytes:
        choices = [self._choice(i, output, output.text, whole=True) for i, output in enumerate(outputs)]
        return self._completion(choices, usage)

    def _choice(
        self, index: int, output: RequestOutput, text: str, *, whole: bool = False
    ) -> completions_api.CompletionChoice:
        told = self._choices[index]
        entries = output.logprobs or () if whole else output.logprobs_delta
        choice = completions_api.CompletionChoice(
            index=index,
            text=text,
            logprobs=self._answer_logprobs(told, entries),
            finish_reason=output.finish_reason,
            stop_reason=output.stop_reason,
        )
        if self._options.token_ids:
            choice.token_ids = output.token_ids if whole else output.token_ids_delta
        if not told.begun:
            told.begun = True
            self._begin(choice, told, output)
        return choice

    def _begin(self, choice: completions_api.CompletionChoice, told: _Choice, output: RequestOutput) -> None:
        """Add the prompt's part to a choice's first chunk."""
        options = self._options
        if told.prompt is not None:
            choice.text = told.prompt + choice.text
            if choice.logprobs is not None and self._logprobs is not None:
                echoed = echoed_logprobs(output, self._logprobs, told.prompt, self._token_bytes)
                choice.logprobs = echoed.followed_by(choice.logprobs)
        if options.prompt_logprobs is not None:
            choice.prompt_logprobs = prompt_logprobs(output, options.prompt_logprobs, self._token_bytes)
        if options.token_ids:
            choice.prompt_token_ids = output.prompt_token_ids

    def _completion(self, choices: list[completions_api.CompletionChoice], usage: Usage | None) -> bytes:
        return self._encode(
            completions_api.Completion(
                id=self._id,
                created=self._created,
                seed=self._seed,
                model=self._options.model,
                choices=choices,
                usage=usage,
            )
        )

    def _answer_logprobs(
        self, told: _Choice, entries: Sequence[TokenLogprob]
    ) -> completions_api.CompletionLogprobs | None:
        """Format them, including the token that ends the answer."""
        if self._logprobs is None:
            return None
        return completion_logprobs(entries, self._token_bytes, told.offsets)
