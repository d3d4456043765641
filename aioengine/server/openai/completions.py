"""``/v1/completions``: prompts in, text out."""

from __future__ import annotations

from sys import getsizeof
from typing import Annotated

from aioengine.server.answer import Answer
from aioengine.server.context import Call
from aioengine.server.openai.api import CompletionRequest, sampling_params
from aioengine.server.openai.form import wanted_form
from aioengine.server.openai.replies import Completion, CompletionReply
from aioengine.server.prompts import check_prompts, prompts_of, texts_of

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""


async def completions(call: Call, data: CompletionRequest) -> Annotated[Answer, Completion]:
    """Complete a prompt."""
    context = call.context
    most, special = context.settings.max_choices, data.add_special_tokens is not False
    prompts = await prompts_of(call, data.prompt, field="prompt", most=most, special=special)
    defaults = await context.defaults()
    max_tokens = defaults.bounded(DEFAULT_MAX_TOKENS) if data.max_tokens is None else data.max_tokens
    check_prompts(context, prompts, data.n or 1, max_tokens=max_tokens, field="prompt")
    logprobs = data.most_likely
    scored = logprobs if logprobs is not None or max_tokens else 0
    wanted = [data.prompt_logprobs, scored if data.echo else None]
    scored = max((count for count in wanted if count is not None), default=None)
    params = sampling_params(data, defaults, max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=scored)
    form = wanted_form(data, context.settings.schemas)
    answer = Answer(call, data, prompts, params, form, prefix="cmpl-")
    echoed = await texts_of(call, data.prompt, prompts) if data.echo else None
    answer.kept = sum(map(getsizeof, echoed or ()))
    answer.reply = CompletionReply(answer.head, data, context.token_bytes(), echoed)
    return answer
