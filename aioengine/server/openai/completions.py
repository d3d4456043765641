"""``/v1/completions``: prompts in, text out."""

from __future__ import annotations

from collections.abc import Sequence
from sys import getsizeof
from typing import Annotated, Any

from aioengine.server.answer import Answer
from aioengine.server.context import Call
from aioengine.server.errors import ApiError, invalid, unsupported
from aioengine.server.openai.api import CompletionRequest
from aioengine.server.openai.form import wanted_form
from aioengine.server.openai.replies import Completion, CompletionReply
from aioengine.server.openai.sampling import sampling_params
from aioengine.server.prompts import check_prompts, encode, kept, last_tokens, texts_of, too_long

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""


async def completions(call: Call, data: CompletionRequest) -> Annotated[Answer, Completion]:
    """Complete a prompt."""
    context = call.context
    if data.suffix:
        raise unsupported("suffix", "text can only be continued, not filled in")
    defaults = await context.defaults()
    max_tokens = defaults.bounded(DEFAULT_MAX_TOKENS) if data.max_tokens is None else data.max_tokens
    keep = kept(context, data.truncate_prompt_tokens, max_tokens)
    whole, texts = await _prompts(call, data, keep)
    prompts = last_tokens(whole, keep)
    check_prompts(context, prompts, data.n or 1, max_tokens=max_tokens, field="prompt")
    logprobs = None if data.logprobs is None or data.logprobs is False else int(data.logprobs)
    of_prompt = [data.prompt_logprobs]
    if data.echo:
        of_prompt += [logprobs, 0 if max_tokens == 0 else None]
    most = max((count for count in of_prompt if count is not None), default=None)
    params = sampling_params(data, defaults, max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=most)
    form = wanted_form(data, context.settings.schemas)
    answer = Answer(context, data, prompts, params, form, call.record, prefix="cmpl-")
    echoed = None
    if data.echo:
        echoed = await texts_of(context, prompts, texts if keep is None else None, call.record)
    answer.kept = sum(map(getsizeof, echoed or ()))
    answer.reply = CompletionReply(
        answer.id,
        answer.seed,
        data,
        len(answer),
        logprobs=logprobs,
        echoed=echoed,
        token_bytes=context.token_bytes(),
    )
    return answer


async def _prompts(
    call: Call, data: CompletionRequest, keep: int | None
) -> tuple[Sequence[list[int]], list[str] | None]:
    """Return the token ids of each prompt, and the texts if the prompts were given as text."""
    context = call.context
    prompt: Any = [data.prompt] if isinstance(data.prompt, str) else data.prompt
    most = context.settings.max_choices
    if len(prompt) > most and not isinstance(prompt[0], int):
        raise ApiError(400, f"prompt: at most {most} prompts", param="prompt")
    if len(prompt) > context.max_model_len and isinstance(prompt[0], int):
        if keep is None:
            raise too_long(context, len(prompt), field="prompt")  # before they are looked at one by one
        prompt = prompt[-context.max_model_len :]
    kinds = set(map(type, prompt))
    if kinds == {str}:
        special = data.add_special_tokens is not False
        tokens = await encode(context, prompt, call.record, add_special_tokens=special, keep=keep)
        return tokens, prompt
    if kinds == {int}:
        return [prompt], None
    if kinds == {list}:
        return list(prompt), None
    raise invalid(
        "prompt", "must be a text, a list of texts, a list of token ids or a list of such lists, not empty"
    )
