"""How families of models write calls and reasoning, and how these are read; docs/server.md has the formats.

A call is read once the text that may be one is complete. For models whose own format is not known, calls are
a JSON list of {"name", "arguments"}, to which a constraint holds the answer. Text that is no call stays text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

from aioengine.server.formats.source import (
    NO_MARKS,
    AnswerParser,
    Marks,
    Reasoning,
    Source,
    Steps,
    arguments_call,
    call_of,
    ends_in_text,
    object_end,
)
from aioengine.server.openai.api import ToolCall

MAX_CALLS = 16
"""Bound on the calls of one answer where calls are required and ``parallel_tool_calls`` is true."""

Read = Callable[[Source], Steps[None]]
"""A format's generator."""


class CallText(NamedTuple):
    """The text around the arguments of calls, so that a grammar can hold an answer to it."""

    opening: str
    """Text before a call's arguments; ``{}`` stands for its name, and a brace is written twice."""
    closing: str
    begin: str = ""
    """Before the first call."""
    between: str = ""
    end: str = ""
    """After the last call."""
    most: int = MAX_CALLS

    def grammar(
        self, names: Sequence[str], schemas: Sequence[str], tokens: Mapping[str, int], *, parallel: bool
    ) -> str:
        """Return a grammar in Lark's notation: calls of ``names`` whose arguments conform to ``schemas``,
        which are JSON schemas as llguidance reads them. It allows one call, or up to ``most`` if
        ``parallel``.

        ``tokens`` has the ids of texts that are single tokens, because the model writes these as tokens.
        """

        def quoted(text: str) -> str:
            """Write the text as terminals, with a space after each; nothing for an empty text, as Lark
            requires."""
            marks = sorted((token for token in tokens if token in text), key=len, reverse=True)
            parts = re.split(f"({'|'.join(map(re.escape, marks))})", text) if marks else [text]
            known = (f"<[{tokens[part]}]>" if part in marks else json.dumps(part) for part in parts if part)
            return "".join(f"{terminal} " for terminal in known)

        again = f"({quoted(self.between)}call){{0,{self.most - 1}}} " if parallel and self.most > 1 else ""
        start = f"start: {quoted(self.begin)}call {again}{quoted(self.end)}".rstrip()
        rules = [start, "call: " + " | ".join(f"call_{i}" for i in range(len(names)))]
        rules += [f"arguments_{i}: %json {schema}" for i, schema in enumerate(schemas)]
        for i, name in enumerate(names):
            opening, closing = quoted(self.opening.format(name)), quoted(self.closing)
            rules.append(f"call_{i}: {opening}arguments_{i} {closing}".rstrip())
        return "\n".join(rules)


_OBJECT = '{{"name": "{}", "arguments": '
JSON_TEXT = CallText(_OBJECT, "}", begin="[", between=",", end="]")
_MOST_MARKS = 16
"""Marks that may be in the texts of one call's arguments."""
_BETWEEN = re.compile(r"[\s;,]*")


def _held(source: Source, marks: Marks) -> Steps[tuple[str, str]]:
    """Take the text before the next of ``marks`` that is not in a text of its JSON, and the mark."""
    parts, mark = [], ""
    for _ in range(_MOST_MARKS):
        part, mark = yield from source.read_until(marks)
        parts.append(part)
        if not mark or not ends_in_text("".join(parts)):
            break
        parts.append(mark)
    return "".join(parts), mark


def _listed(text: str, names: frozenset[str] | None, begin: int, end: str) -> Iterator[str | ToolCall]:
    """Yield calls of ``names``, each an object, from ``begin`` on, and what is left of the text: all of it if
    there is no call. ``end`` may stand after the last one."""
    at, count = begin, 0
    while True:
        found = _BETWEEN.match(text, at)
        start = found.end() if found else at
        stop = object_end(text, start) if text.startswith("{", start) else 0
        call = call_of(text[start:stop], names) if stop else None
        if call is None:
            break
        yield call
        at, count = stop, count + 1
    rest = text[at:] if count else text
    yield rest.lstrip().removeprefix(end) if end and count and rest.lstrip().startswith(end) else rest


# Hermes, Qwen 2.5 and 3

TOOL_CALL, END_TOOL_CALL = "<tool_call>", "</tool_call>"
HERMES_TEXT = CallText(f"{TOOL_CALL}\n{_OBJECT}", f"}}\n{END_TOOL_CALL}", between="\n")
_HERMES, _HERMES_END = Marks(TOOL_CALL), Marks(END_TOOL_CALL)


def hermes(names: frozenset[str], source: Source) -> Steps[None]:
    while (yield from source.until(_HERMES)):
        body, mark = yield from _held(source, _HERMES_END)
        call = call_of(body.strip(), names) if mark else None
        yield call or TOOL_CALL + body + mark


# Llama 3.1 to 3.3

PYTHON_TAG = "<|python_tag|>"
LLAMA_TEXT = CallText('{{"name": "{}", "parameters": ', "}", between="; ")


def llama3(names: frozenset[str], source: Source) -> Steps[None]:
    begin = yield from source.blank()
    if (yield from source.literal(PYTHON_TAG)):
        begin += PYTHON_TAG
    if (yield from source.literal("{")):
        rest, _ = yield from source.read_until(NO_MARKS)
        yield from _listed(begin + "{" + rest, names, len(begin), "")
    else:
        yield begin
        yield from source.until(NO_MARKS)


# Mistral: older models write a list, newer ones the name before the arguments, also with a call's id

TOOL_CALLS, ARGUMENTS = "[TOOL_CALLS]", "[ARGS]"
MISTRAL_LIST_TEXT = CallText(_OBJECT, "}", begin=f"{TOOL_CALLS}[", between=", ", end="]")
MISTRAL_TEXT = CallText(f"{TOOL_CALLS}{{}}{ARGUMENTS}", "")
_MISTRAL = Marks(TOOL_CALLS)
_NAMED = re.compile(r"\s*([A-Za-z0-9_.-]{1,64})(?:(?:\[CALL_ID\][^{\[]*)?\[ARGS\])?\s*(?={)")


def mistral(names: frozenset[str], source: Source) -> Steps[None]:
    mark = yield from source.until(_MISTRAL)
    while mark:
        body, mark = yield from _held(source, _MISTRAL)
        named = _NAMED.match(body)
        end = object_end(body, named.end()) if named else 0
        if named and end and named[1] in names:
            call = arguments_call(named[1], body[named.end() : end])
            yield call or TOOL_CALLS + body[:end]
            yield body[end:]
        elif body.lstrip().startswith("["):
            yield from _listed(TOOL_CALLS + body, names, len(TOOL_CALLS) + body.index("[") + 1, "]")
        else:
            yield TOOL_CALLS + body


# GPT-OSS ("harmony"): a sequence of <|channel|>NAME to=RECIPIENT<|constrain|>json<|message|>TEXT<|end|>. The
# prompt ends with <|start|>assistant, so the first message has no start of its own.

CHANNEL, MESSAGE, START = "<|channel|>", "<|message|>", "<|start|>"
HARMONY_TEXT = CallText(f"{CHANNEL}commentary to=functions.{{}} <|constrain|>json{MESSAGE}", "", most=1)
"""Beginning and end are empty, because the model has tokens of its own there. An answer has one call."""
_BEGIN = Marks(CHANNEL, START)
_HEADER_END = Marks(MESSAGE, START)
_BODY_END = Marks("<|end|>", "<|return|>", "<|call|>", START, CHANNEL)
_CHANNEL_NAME = re.compile(re.escape(CHANNEL) + r"\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=functions\.([A-Za-z0-9_.-]+)")


def harmony(names: frozenset[str], source: Source, *, reasons: bool = True) -> Steps[None]:
    """Parse messages: "analysis" is reasoning, unless ``reasons`` is false; one to ``functions.NAME`` is a
    call; everything else is text for the user."""
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


# What a constraint holds an answer to: a call that is cut off is left out


def json_calls(source: Source) -> Steps[None]:
    """Read an answer that is a list of {"name", "arguments"}."""
    text, _ = yield from source.read_until(NO_MARKS)
    yield from (piece for piece in _listed(text.lstrip(" \n["), None, 0, "]") if not isinstance(piece, str))


# Qwen 3, DeepSeek R1 and many others

THINK, END_THINK = "<think>", "</think>"
_THINK_END = Marks(END_THINK)


def think(then: Read, is_open: bool, source: Source) -> Steps[None]:
    """Parse reasoning between the tags, if the prompt has opened it (``is_open``) or the answer begins with
    the tag. ``then`` parses the rest. White space beside the tags is dropped."""
    space = yield from source.blank()
    if (yield from source.literal(THINK)) or is_open:
        yield from source.blank()
        yield from source.until(_THINK_END, Reasoning)
        yield from source.blank()
    elif space:
        yield space
    yield from then(source)


# Which of them a model has


class ToolFormat(NamedTuple):
    """Form in which a family writes calls."""

    read: Callable[[frozenset[str], Source], Steps[None]]
    """Parses an answer with calls of these names."""
    shown_by: tuple[str, ...]
    """Texts in the chat template of a model that writes calls so."""
    written: Mapping[str, CallText]
    """Form of calls, by a text in the chat template; the last one by none."""
    special: bool = True
    """Whether marks of the format are special tokens, which an answer's text otherwise leaves out."""


_MISTRAL_TEXTS = {ARGUMENTS: MISTRAL_TEXT, "": MISTRAL_LIST_TEXT}
_HERMES_SHOWN = (TOOL_CALL, END_TOOL_CALL)
_LLAMA = ("<|start_header_id|>", '"parameters"')
TOOLS = {
    "harmony": ToolFormat(harmony, (CHANNEL,), {"": HARMONY_TEXT}),
    "mistral": ToolFormat(mistral, (TOOL_CALLS,), _MISTRAL_TEXTS),
    "hermes": ToolFormat(hermes, _HERMES_SHOWN, {"": HERMES_TEXT}, special=False),
    "llama3": ToolFormat(llama3, _LLAMA, {"": LLAMA_TEXT}),
}
"""The first format that a chat template shows is the model's."""
REASONING = {"harmony": (CHANNEL,), "think": (THINK, END_THINK)}
"""Name -> texts in the chat template of a model that writes reasoning so."""


def plain(source: Source) -> Steps[None]:
    """Parse an answer that is text alone."""
    yield from source.until(NO_MARKS)


class AnswerFormats(NamedTuple):
    """Formats of a model's answers."""

    tools: str | None
    reasoning: str | None
    written: CallText = JSON_TEXT
    """Form in which the model writes calls or, if that is not known, is made to write them."""
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
        texts = {"": JSON_TEXT} if tool is None else TOOLS[tool].written
        written = next(text for shown, text in texts.items() if shown in template)
        return cls(tool, choose(reasoning, REASONING), written, tokens or {})

    @property
    def is_harmony(self) -> bool:
        return "harmony" in (self.tools, self.reasoning)

    def needs_special_tokens(self, with_tools: bool) -> bool:
        """Whether an answer's text must have its special tokens."""
        return self.is_harmony or (with_tools and self.tools is not None and TOOLS[self.tools].special)

    def parser(
        self, names: frozenset[str], *, single: bool, is_held: bool = False, is_thinking: bool = False
    ) -> AnswerParser | None:
        """Make a parser for an answer with calls of ``names``; None if there is nothing to look for.

        ``is_held``: a grammar of :attr:`written` holds the answer to calls. ``is_thinking``: the prompt has
        begun the model's reasoning, and no constraint keeps the answer from going on with it.
        """
        read: Read | None = None
        if self.is_harmony and not is_held:
            known = names if self.tools == "harmony" else frozenset[str]()
            read = partial(harmony, known, reasons=self.reasoning == "harmony")
        elif self.tools is not None and (names or is_held):
            read = partial(TOOLS[self.tools].read, names)
        elif is_held:
            read = json_calls
        if self.reasoning == "think" and not is_held and not self.is_harmony:
            read = partial(think, read or plain, is_thinking)
        return None if read is None else AnswerParser(read, single=single)
