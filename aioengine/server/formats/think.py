"""Reasoning between ``<think>`` and ``</think>`` before the answer: Qwen 3, DeepSeek R1 and many others."""

from __future__ import annotations

from collections.abc import Callable

from aioengine.server.formats.source import Marks, Reasoning, Source, Steps

OPEN, CLOSE = "<think>", "</think>"
_END = Marks(CLOSE)


def think(then: Callable[[Source], Steps[None]], *, is_open: bool) -> Callable[[Source], Steps[None]]:
    """Parse reasoning, if the prompt has opened it (``is_open``) or the answer begins with the tag. ``then``
    parses the rest. White space beside the tags is dropped."""

    def steps(source: Source) -> Steps[None]:
        space = yield from source.blank()
        if (yield from source.literal(OPEN)) or is_open:
            yield from source.blank()
            yield from source.until(_END, Reasoning)
            yield from source.blank()
        elif space:
            yield space
        yield from then(source)

    return steps
