"""The table of formats, and which of them a model has."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import NamedTuple

from aioengine.checks import nearest
from aioengine.errors import ConfigError
from aioengine.server.formats import calls
from aioengine.server.formats.calls import CallText, Read
from aioengine.server.formats.source import NO_MARKS, AnswerParser, Source, Steps


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


_MISTRAL = {calls.ARGUMENTS: calls.MISTRAL_TEXT, "": calls.MISTRAL_LIST_TEXT}
_HERMES = (calls.TOOL_CALL, calls.END_TOOL_CALL)
_LLAMA = ("<|start_header_id|>", '"parameters"')
TOOLS = {
    "harmony": ToolFormat(calls.harmony, (calls.CHANNEL,), {"": calls.HARMONY_TEXT}),
    "mistral": ToolFormat(calls.mistral, (calls.TOOL_CALLS,), _MISTRAL),
    "gemma": ToolFormat(calls.gemma, (calls.GEMMA_OPEN,), {}, calls.GEMMA_CLOSE),
    "hermes": ToolFormat(calls.hermes, _HERMES, {"": calls.HERMES_TEXT}, calls.END_TOOL_CALL, special=False),
    "llama3": ToolFormat(calls.llama3, _LLAMA, {"": calls.LLAMA_TEXT}),
}
"""The first format that a chat template shows is the model's."""
REASONING = {"harmony": (calls.CHANNEL,), "think": (calls.THINK, calls.END_THINK)}
"""Name -> texts in the chat template of a model that writes reasoning so."""


class AnswerFormats(NamedTuple):
    """Formats of a model's answers."""

    tools: str | None
    reasoning: str | None
    written: CallText | None = None
    """Form in which the model writes calls; None if that is not known, or if arguments are not JSON."""
    tokens: Mapping[str, int] = MappingProxyType({})
    """Texts that are tokens of their own, and their ids."""

    @classmethod
    def chosen(
        cls, chat_template: str | None, tools: str, reasoning: str, tokens: Mapping[str, int] | None = None
    ) -> AnswerFormats:
        """Choose formats by name. "auto" is the format that the chat template shows, "none" is none."""
        template = chat_template or ""

        def choose(name: str, known: Mapping[str, tuple[str, ...]]) -> str | None:
            if name == "auto":
                shown = (own for own, texts in known.items() if all(text in template for text in texts))
                return next(shown, None)
            return None if name == "none" else name

        tool = choose(tools, {name: known.shown_by for name, known in TOOLS.items()})
        texts = {} if tool is None else TOOLS[tool].written
        written = next((text for shown, text in texts.items() if shown in template), None)
        return cls(tool, choose(reasoning, REASONING), written, tokens or {})

    @property
    def closing(self) -> str | None:
        """Text that ends every call."""
        return None if self.tools is None else TOOLS[self.tools].closing

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
            return AnswerParser(calls.harmony(known, self.reasoning == "harmony"), single=single)
        read: Read = _plain
        if names and self.tools is not None:
            read = TOOLS[self.tools].read(names)
        elif self.reasoning is None:
            return None
        if self.reasoning == "think":
            read = calls.think(read, is_open=is_thinking)
        return AnswerParser(read, single=single, closing=self.closing)

    def held(self, names: frozenset[str], *, single: bool, forced: str | None = None) -> AnswerParser:
        """Make a parser for an answer that a grammar of :attr:`required` holds to calls; of a ``forced``
        function without a known form, to its arguments alone."""
        if self.written is not None and self.tools is not None:
            return AnswerParser(TOOLS[self.tools].read(names), single=single)
        read = calls.json_calls if forced is None else calls.named_call(forced)
        return AnswerParser(read, single=single)


NO_FORMATS = AnswerFormats(None, None)


def _plain(source: Source) -> Steps[None]:
    """Parse an answer that is text alone."""
    yield from source.until(NO_MARKS)


def check_name(field: str, name: str, known: Collection[str]) -> None:
    """Raise ConfigError unless the format is known."""
    names = ["auto", "none", *known]
    if name not in names:
        raise ConfigError(f"{field}={name!r}: must be one of {', '.join(names)}{nearest(name, names)}")
