"""Names of the formats, and which of them a model has."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import NamedTuple

from aioengine.checks import nearest
from aioengine.errors import ConfigError
from aioengine.server.formats import gemma, harmony, hermes, llama3, mistral, think
from aioengine.server.formats.call_text import CallText
from aioengine.server.formats.json_calls import WRITTEN as JSON_WRITTEN
from aioengine.server.formats.json_calls import json_calls, named_call
from aioengine.server.formats.source import AnswerParser, Source, Steps, plain


class ToolFormat(NamedTuple):
    """Form in which a family writes calls."""

    steps: Callable[[frozenset[str]], Callable[[Source], Steps[None]]]
    """Makes a parser's generator for functions of these names."""
    shows: Callable[[str], bool]
    """Whether a model with this chat template writes calls in this format."""
    written: Callable[[str], CallText | None]
    """Returns the form of calls with this chat template; None where arguments are not JSON."""
    closing: str | None = None
    """Text that ends every call."""
    special: bool = True
    """Whether marks of the format are special tokens, which an answer's text otherwise leaves out."""


TOOLS: dict[str, ToolFormat] = {
    "harmony": ToolFormat(
        harmony.harmony, lambda template: harmony.CHANNEL in template, lambda _template: harmony.WRITTEN
    ),
    "mistral": ToolFormat(mistral.mistral, lambda template: mistral.OPEN in template, mistral.written),
    "gemma": ToolFormat(
        gemma.gemma, lambda template: gemma.OPEN in template, lambda _template: None, gemma.CLOSE
    ),
    "hermes": ToolFormat(
        hermes.hermes,
        lambda template: hermes.OPEN in template and hermes.CLOSE in template,
        lambda _template: hermes.WRITTEN,
        hermes.CLOSE,
        special=False,
    ),
    "llama3": ToolFormat(
        llama3.llama3,
        lambda template: "<|start_header_id|>" in template and '"parameters"' in template,
        lambda _template: llama3.WRITTEN,
    ),
}
"""The first format that a chat template shows is the model's."""
REASONING: dict[str, Callable[[str], bool]] = {
    "harmony": lambda template: harmony.CHANNEL in template,
    "think": lambda template: think.OPEN in template and think.CLOSE in template,
}
"""Name -> whether a model with this chat template writes reasoning in this format."""


NO_TOKENS: Mapping[str, int] = MappingProxyType({})


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
        if tools == "auto":
            tools = next((name for name, known in TOOLS.items() if known.shows(template)), "none")
        if reasoning == "auto":
            reasoning = next((name for name, shows in REASONING.items() if shows(template)), "none")
        return cls(
            None if tools == "none" else tools, None if reasoning == "none" else reasoning, template, tokens
        )

    @property
    def closing(self) -> str | None:
        """Text that ends every call."""
        return None if self.tools is None else TOOLS[self.tools].closing

    @property
    def written(self) -> CallText | None:
        """Form in which the model writes calls; None if that is not known, or if arguments are not JSON."""
        return None if self.tools is None else TOOLS[self.tools].written(self.chat_template)

    @property
    def required(self) -> CallText:
        """Form of required calls: in the model's format, or else in this server's JSON."""
        return self.written or JSON_WRITTEN

    def needs_special_tokens(self, with_tools: bool) -> bool:
        """Whether an answer's text must have its special tokens."""
        is_harmony = "harmony" in (self.tools, self.reasoning)
        return is_harmony or (with_tools and self.tools is not None and TOOLS[self.tools].special)

    def free(self, names: frozenset[str], *, single: bool, is_thinking: bool) -> AnswerParser | None:
        """Make a parser for an answer without a constraint; None if there is nothing to look for.
        ``is_thinking`` says whether the prompt has begun the model's reasoning."""
        if "harmony" in (self.tools, self.reasoning):
            reasons = self.reasoning == "harmony"
            known = names if self.tools == "harmony" else frozenset[str]()
            return AnswerParser(harmony.harmony(known, reasons), single=single)
        steps: Callable[[Source], Steps[None]] = plain
        if names and self.tools is not None:
            steps = TOOLS[self.tools].steps(names)
        elif self.reasoning is None:
            return None
        if self.reasoning == "think":
            steps = think.think(steps, is_open=is_thinking)
        return AnswerParser(steps, single=single, closing=self.closing)

    def held(self, names: frozenset[str], *, single: bool) -> AnswerParser:
        """Make a parser for an answer that a grammar of :attr:`required` holds to calls."""
        steps = json_calls if self.written is None or self.tools is None else TOOLS[self.tools].steps(names)
        return AnswerParser(steps, single=single)


NO_FORMATS = AnswerFormats(None, None, "", NO_TOKENS)


def arguments_parser(name: str) -> AnswerParser:
    """Make a parser for an answer that a grammar holds to the arguments of ``name``."""
    return AnswerParser(named_call(name))


def check_name(field: str, name: str, known: Collection[str]) -> None:
    """Raise ConfigError unless the format is known."""
    names = ["auto", "none", *known]
    if name not in names:
        raise ConfigError(f"{field}={name!r}: must be one of {', '.join(names)}{nearest(name, names)}")
