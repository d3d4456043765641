"""The table of formats, and which of them a model has."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import NamedTuple

from aioengine.checks import nearest
from aioengine.errors import ConfigError
from aioengine.server.formats import calls, gemma, harmony
from aioengine.server.formats.calls import CallText, Read
from aioengine.server.formats.source import NO_MARKS, AnswerParser, Marks, Reasoning, Source, Steps

THINK, END_THINK = "<think>", "</think>"
_THINK_END = Marks(END_THINK)


class ToolFormat(NamedTuple):
    """Form in which a family writes calls."""

    read: Callable[[frozenset[str]], Read]
    """Makes a parser's generator for functions of these names."""
    shown_by: tuple[str, ...]
    """Texts in the chat template of a model that writes calls so."""
    written: Mapping[str, CallText]
    """Form of calls, by a text in the chat template; none where arguments are not JSON."""
    closing: str | None = None
    """Text that ends every call."""
    special: bool = True
    """Whether marks of the format are special tokens, which an answer's text otherwise leaves out."""


TOOLS = {
    "harmony": ToolFormat(harmony.harmony, (harmony.CHANNEL,), {"": harmony.TEXT}),
    "mistral": ToolFormat(
        calls.mistral,
        (calls.TOOL_CALLS,),
        {calls.ARGUMENTS: calls.MISTRAL_TEXT, "": calls.MISTRAL_LIST_TEXT},
    ),
    "gemma": ToolFormat(gemma.gemma, (gemma.OPEN,), {}, gemma.CLOSE),
    "hermes": ToolFormat(
        calls.hermes,
        (calls.TOOL_CALL, calls.END_TOOL_CALL),
        {"": calls.HERMES_TEXT},
        calls.END_TOOL_CALL,
        special=False,
    ),
    "llama3": ToolFormat(calls.llama3, ("<|start_header_id|>", '"parameters"'), {"": calls.LLAMA_TEXT}),
}
"""The first format that a chat template shows is the model's."""
REASONING = {"harmony": (harmony.CHANNEL,), "think": (THINK, END_THINK)}
"""Name -> texts in the chat template of a model that writes reasoning so."""
NO_TOKENS: Mapping[str, int] = MappingProxyType({})


def think(then: Read, *, is_open: bool) -> Read:
    """Parse reasoning between ``<think>`` and ``</think>`` (Qwen 3, DeepSeek R1 and many others), if the
    prompt has opened it (``is_open``) or the answer begins with the tag. ``then`` parses the rest. White
    space beside the tags is dropped."""

    def steps(source: Source) -> Steps[None]:
        space = yield from source.blank()
        if (yield from source.literal(THINK)) or is_open:
            yield from source.blank()
            yield from source.until(_THINK_END, Reasoning)
            yield from source.blank()
        elif space:
            yield space
        yield from then(source)

    return steps


def plain(source: Source) -> Steps[None]:
    """Parse an answer that is text alone."""
    yield from source.until(NO_MARKS)


class AnswerFormats(NamedTuple):
    """Formats of a model's answers."""

    tools: str | None
    reasoning: str | None
    chat_template: str
    tokens: Mapping[str, int]
    """Texts that are tokens of their own, and their ids."""

    @classmethod
    def chosen(
        cls, chat_template: str | None, tools: str, reasoning: str, tokens: Mapping[str, int] = NO_TOKENS
    ) -> AnswerFormats:
        """Choose formats by name. "auto" is the format that the chat template shows, "none" is none."""
        template = chat_template or ""

        def choose(name: str, known: Mapping[str, tuple[str, ...]]) -> str | None:
            if name == "auto":
                shown = (own for own, texts in known.items() if all(text in template for text in texts))
                return next(shown, None)
            return None if name == "none" else name

        shown_by = {name: known.shown_by for name, known in TOOLS.items()}
        return cls(choose(tools, shown_by), choose(reasoning, REASONING), template, tokens)

    @property
    def closing(self) -> str | None:
        """Text that ends every call."""
        return None if self.tools is None else TOOLS[self.tools].closing

    @property
    def written(self) -> CallText | None:
        """Form in which the model writes calls; None if that is not known, or if arguments are not JSON."""
        known = {} if self.tools is None else TOOLS[self.tools].written
        return next((text for shown, text in known.items() if shown in self.chat_template), None)

    @property
    def required(self) -> CallText:
        """Form of required calls: in the model's format, or else in this server's JSON."""
        return self.written or calls.JSON_TEXT

    def needs_special_tokens(self, with_tools: bool) -> bool:
        """Whether an answer's text must have its special tokens."""
        is_harmony = "harmony" in (self.tools, self.reasoning)
        return is_harmony or (with_tools and self.tools is not None and TOOLS[self.tools].special)

    def free(self, names: frozenset[str], *, single: bool, is_thinking: bool) -> AnswerParser | None:
        """Make a parser for an answer without a constraint; None if there is nothing to look for.
        ``is_thinking`` says whether the prompt has begun the model's reasoning."""
        if "harmony" in (self.tools, self.reasoning):
            known = names if self.tools == "harmony" else frozenset[str]()
            return AnswerParser(harmony.harmony(known, self.reasoning == "harmony"), single=single)
        read: Read = plain
        if names and self.tools is not None:
            read = TOOLS[self.tools].read(names)
        elif self.reasoning is None:
            return None
        if self.reasoning == "think":
            read = think(read, is_open=is_thinking)
        return AnswerParser(read, single=single, closing=self.closing)

    def held(self, names: frozenset[str], *, single: bool) -> AnswerParser:
        """Make a parser for an answer that a grammar of :attr:`required` holds to calls."""
        is_known = self.written is not None and self.tools is not None
        read = TOOLS[self.tools].read(names) if is_known and self.tools is not None else calls.json_calls
        return AnswerParser(read, single=single)


NO_FORMATS = AnswerFormats(None, None, "", NO_TOKENS)


def arguments_parser(name: str) -> AnswerParser:
    """Make a parser for an answer that a grammar holds to the arguments of ``name``."""
    return AnswerParser(calls.named_call(name))


def check_name(field: str, name: str, known: Collection[str]) -> None:
    """Raise ConfigError unless the format is known."""
    names = ["auto", "none", *known]
    if name not in names:
        raise ConfigError(f"{field}={name!r}: must be one of {', '.join(names)}{nearest(name, names)}")
