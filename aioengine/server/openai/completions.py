"""``/v1/completions``: prompts in, text out."""

from __future__ import annotations

from sys import getsizeof
from typing import Annotated, Any

from aioengine.server.answer import Answer
from aioengine.server.context import Call
from aioengine.server.errors import invalid
from aioengine.server.openai.api import CompletionRequest
from aioengine.server.openai.form import wanted_form
from aioengine.server.openai.replies import Completion, CompletionReply
from aioengine.server.openai.sampling import sampling_params
from aioengine.server.prompts import NO_PROMPT, check_prompts, encode, texts_of, too_long

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""


async def completions(call: Call, data: CompletionRequest) -> Annotated[Answer, Completion]:
    """Complete a prompt."""
    context = call.context
    prompts, texts = await _prompts(call, data)
    defaults = await context.defaults()
    max_tokens = defaults.bounded(DEFAULT_MAX_TOKENS) if data.max_tokens is None else data.max_tokens
    check_prompts(context, prompts, data.n or 1, max_tokens=max_tokens, field="prompt")
    logprobs = None if data.logprobs is None or data.logprobs is False else int(data.logprobs)
    scored = logprobs if logprobs is not None or max_tokens else 0
    wanted = [data.prompt_logprobs, scored if data.echo else None]
    scored = max((count for count in wanted if count is not None), default=None)
    params = sampling_params(data, defaults, max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=scored)
    form = wanted_form(data, context.settings.schemas)
    answer = Answer(call, data, prompts, params, form, prefix="cmpl-")
    echoed = (texts or await texts_of(call, prompts)) if data.echo else None
    answer.kept = sum(map(getsizeof, echoed or ()))
    answer.reply = CompletionReply(
        answer.id,
        answer.seed,
        data,
        context.token_bytes(),
        count=len(answer),
        logprobs=logprobs,
        echoed=echoed,
    )
    return answer


async def _prompts(call: Call, data: CompletionRequest) -> tuple[list[list[int]], list[str] | None]:
    """Return the token ids of each prompt, and the texts if the prompts were given as text."""
    context = call.context
    prompt: Any = [data.prompt] if isinstance(data.prompt, str) else data.prompt
    # Before they are looked at one by one.
    if prompt and isinstance(prompt[0], int) and len(prompt) > context.max_model_len:
        raise too_long(context, len(prompt), field="prompt")
    if prompt and not isinstance(prompt[0], int) and len(prompt) > context.settings.max_choices:
        raise invalid("prompt", f"at most {context.settings.max_choices} prompts")
    kinds = set(map(type, prompt))
    if kinds == {str}:
        special = data.add_special_tokens is not False
        return await encode(call, prompt, special=special, field="prompt"), prompt
    if kinds == {int}:
        return [prompt], None
    if kinds == {list}:
        return list(prompt), None
    raise invalid("prompt", NO_PROMPT)
