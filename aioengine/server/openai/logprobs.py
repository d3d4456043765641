"""Log-probabilities in OpenAI's two formats."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from aioengine.request import RequestOutput, TokenLogprob
from aioengine.server.openai.chat_api import ChatLogprobs, ChatTokenLogprob, TopLogprob
from aioengine.server.openai.completions_api import CompletionLogprobs

TokenBytes = Callable[[int], bytes]


def new_logprobs(output: RequestOutput, since: int) -> Sequence[TokenLogprob]:
    """Those from the ``since``-th token on, without that of a token that ended the output: it is no part
    of the text."""
    entries = output.logprobs or []
    end = len(entries)
    if output.finished and isinstance(output.stop_reason, int):
        end -= 1
    return entries[since:end]


def completion_logprobs(
    entries: Sequence[TokenLogprob], token_bytes: TokenBytes, offset: int
) -> tuple[CompletionLogprobs, int]:
    """``offset`` is where the first token begins in the answer's text; returns where the last one ends."""
    result = CompletionLogprobs([], [], [], [])
    for entry in entries:
        text = _text(token_bytes(entry.token_id))
        result.tokens.append(text)
        result.token_logprobs.append(_finite(entry.logprob))
        top = {_text(token_bytes(token)): _finite(logprob) for token, logprob in reversed(entry.top)}
        top.setdefault(text, _finite(entry.logprob))
        result.top_logprobs.append(top)
        result.text_offset.append(offset)
        offset += len(text)
    return result, offset


def chat_logprobs(entries: Sequence[TokenLogprob], token_bytes: TokenBytes) -> ChatLogprobs:
    def top(token: int, logprob: float) -> TopLogprob:
        data = token_bytes(token)
        return TopLogprob(_text(data), _finite(logprob), list(data))

    content = []
    for entry in entries:
        own = top(entry.token_id, entry.logprob)
        best = [top(token, logprob) for token, logprob in entry.top]
        content.append(ChatTokenLogprob(own.token, own.logprob, own.bytes, best))
    return ChatLogprobs(content)


def _text(data: bytes) -> str:
    return data.decode(errors="replace")


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI's API writes -9999 for it."""
    return max(logprob, -9999.0)
