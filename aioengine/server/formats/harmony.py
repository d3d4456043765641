"""GPT-OSS's messages ("harmony"): an answer is a sequence of
``<|channel|>NAME to=RECIPIENT<|constrain|>json<|message|>TEXT<|end|>``.

The channel "analysis" is reasoning, a message to ``functions.NAME`` is a call, and everything else is text
for the user. The prompt ends with ``<|start|>assistant``, so the first message has no start of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from aioengine.server.formats.calls import CallText
from aioengine.server.formats.source import Marks, Reasoning, Source, Steps, arguments_call

CHANNEL, MESSAGE, START, CALL = "<|channel|>", "<|message|>", "<|start|>", "<|call|>"
_BEGIN = Marks(CHANNEL, START)
_HEADER_END = Marks(MESSAGE, START)
_BODY_END = Marks("<|end|>", "<|return|>", CALL, START, CHANNEL)
_CHANNEL_NAME = re.compile(re.escape(CHANNEL) + r"\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=functions\.([A-Za-z0-9_.-]+)")

TEXT = CallText(f"{CHANNEL}commentary to=functions.{{}} <|constrain|>json{MESSAGE}", "", most=1)
"""Form of calls. Beginning and end are empty, because the model has tokens of its own there. An answer has
one call."""


def harmony(names: frozenset[str], reasons: bool = True) -> Callable[[Source], Steps[None]]:
    """Parse calls of ``names``, and reasoning; if ``reasons`` is false, reasoning stays text."""

    def steps(source: Source) -> Steps[None]:
        to = " to="
        mark = to if (yield from source.literal(to)) else (yield from source.until(_BEGIN))
        while mark:
            header, end = yield from source.read_until(_HEADER_END)
            header = mark + header
            if end != MESSAGE:
                if end != START:
                    yield header
                mark = end
                continue
            channel, recipient = _CHANNEL_NAME.search(header), _RECIPIENT.search(header)
            if recipient and recipient[1] in names:
                body, mark = yield from source.read_until(_BODY_END)
                yield arguments_call(recipient[1], body or "{}") or header + MESSAGE + body
            else:
                is_reasoning = reasons and channel is not None and channel[1] == "analysis"
                mark = yield from source.until(_BODY_END, Reasoning if is_reasoning else str)
            if mark and mark not in (START, CHANNEL):
                mark = yield from source.until(_BEGIN)

    return steps
