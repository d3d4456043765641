"""Incremental parsing of an answer: the text that has come, and what formats read from it.

A format is a generator over a :class:`Source`. It yields pieces of the answer, and None where it needs more
text; :class:`AnswerParser` runs it as text comes. What a format does depends on the text alone and not on
how it is cut, and each character is looked at a bounded number of times, so that long answers cost no more.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple, TypeVar

import msgspec

from aioengine.server.openai.api import ToolCall

T = TypeVar("T")


class Reasoning(str):
    """Text of an answer that is the model's reasoning."""


Steps = Generator[str | Reasoning | ToolCall | None, None, T]
"""Yields pieces, and None when it needs more text; returns a T."""


class Parsed(NamedTuple):
    """Parts of the answer that have become certain."""

    text: str
    calls: Sequence[ToolCall] = ()
    reasoning: str = ""


class Marks:
    """Texts that mean something in an answer."""

    def __init__(self, *texts: str) -> None:
        self.pattern = re.compile("|".join(map(re.escape, texts)) if texts else "(?!)")
        self._texts = texts
        self._longest = max(map(len, texts), default=0)

    def beginning_of(self, text: str, at: int) -> int:
        """Return how many characters at the end of ``text``, from ``at`` on, may be the beginning of a
        mark."""
        for begin in range(max(at, len(text) - self._longest + 1), len(text)):
            if any(mark.startswith(text[begin:]) for mark in self._texts):
                return len(text) - begin
        return 0


NO_MARKS = Marks()
_BLANK = re.compile(r"\s*")


class Source:
    """Text of an answer that is still to be read."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self.ended = False

    def add(self, text: str) -> None:
        self._text = self._text[self._at :] + text
        self._at = 0

    def _take(self, end: int) -> str:
        begin, self._at = self._at, end
        return self._text[begin:end]

    def until(self, marks: Marks, kind: type[str] = str, parts: list[str] | None = None) -> Steps[str]:
        """Yield the text before the next of ``marks`` as ``kind``, or add it to ``parts``. Return the mark,
        or "" at the end."""
        while True:
            found = marks.pattern.search(self._text, self._at)
            held = 0 if found or self.ended else marks.beginning_of(self._text, self._at)
            end = found.start() if found else len(self._text) - held
            if end > self._at:
                piece = kind(self._take(end))
                if parts is None:
                    yield piece
                else:
                    parts.append(piece)
            if found:
                return self._take(found.end())
            if self.ended:
                return ""
            yield None

    def read_until(self, marks: Marks) -> Steps[tuple[str, str]]:
        """Take the text before the next of ``marks``, and the mark; "" for it at the end."""
        parts: list[str] = []
        mark = yield from self.until(marks, parts=parts)
        return "".join(parts), mark

    def literal(self, text: str) -> Steps[bool]:
        """Take ``text`` if it comes next. Returns whether it did."""
        while True:
            if self._text.startswith(text, self._at):
                self._at += len(text)
                return True
            if self.ended or not text.startswith(self._text[self._at :]):
                return False
            yield None

    def blank(self) -> Steps[str]:
        """Take white space."""
        parts: list[str] = []
        while True:
            found = _BLANK.match(self._text, self._at)
            parts.append(self._take(found.end()) if found else "")
            if self._at < len(self._text) or self.ended:
                return "".join(parts)
            yield None


class AnswerParser:
    """Runs a format's generator. White space alone before, between and after calls is dropped; with
    ``single`` everything after the first call."""

    def __init__(self, steps: Callable[[Source], Steps[None]], *, single: bool = False) -> None:
        self._source = Source()
        self._steps = steps(self._source)
        self._single = single
        self._space: list[str] = []
        """Text since the last call, as long as it is white space alone."""
        self._in_text = False
        self._called = False

    def push(self, text: str, *, is_last: bool = False) -> Parsed:
        self._source.add(text)
        self._source.ended = is_last
        texts: list[str] = []
        reasoning: list[str] = []
        calls: list[ToolCall] = []
        for piece in self._steps:
            if piece is None:
                break
            if self._single and self._called:
                continue
            if isinstance(piece, ToolCall):
                calls.append(piece)
                self._space, self._in_text, self._called = [], False, True
            elif isinstance(piece, Reasoning):
                reasoning.append(piece)
            elif self._in_text:
                texts.append(piece)
            else:  # not the whole space again: it may be long
                self._space.append(piece)
                if piece and not piece.isspace():
                    self._in_text = True
                    texts += self._space
                    self._space = []
        if is_last and not self._called:
            texts += self._space
        return Parsed("".join(texts), calls, "".join(reasoning))


_TEXT = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|"', re.DOTALL)
"""A quotation mark alone begins a text without an end."""
_SPACE = re.compile(r'("[^"\\]*(?:\\.[^"\\]*)*")|\s+', re.DOTALL)
"""White space outside of texts, or a text, which is a group."""
_READER = json.JSONDecoder(parse_int=len, parse_float=len)  # numbers may be too large to be read as such
_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_NULL, _NOTHING = msgspec.Raw(b"null"), msgspec.Raw(b"{}")


def object_end(text: str, begin: int) -> int:
    """Return where the JSON that begins with a brace or bracket at ``begin`` ends; 0 if it does not."""
    try:
        return _READER.raw_decode(text, begin)[1]
    except (ValueError, RecursionError):
        return 0


def ends_in_text(written: str) -> bool:
    """Whether what follows belongs to a text of this JSON."""
    return '"' in (found[0] for found in _TEXT.finditer(written))


def call_of(body: str, names: frozenset[str] | None) -> ToolCall | None:
    """Convert JSON with "name" and "arguments" or "parameters" to a call of one of ``names`` (None: of any);
    None for any other text."""
    try:
        fields = _FIELDS.decode(body)
        name = msgspec.json.decode(fields.get("name", _NULL))
    except (msgspec.DecodeError, RecursionError):
        return None
    if not isinstance(name, str) or (names is not None and name not in names):
        return None
    arguments = fields.get("arguments", fields.get("parameters", _NOTHING))
    return arguments_call(name, str(arguments, "utf-8"))


def arguments_call(name: str, arguments: str) -> ToolCall | None:
    """Make a call with these arguments as they are written, without white space: numbers keep their digits,
    and may be larger than those that can be decoded here. None if they are not a JSON object."""
    text = arguments.strip()
    try:
        _FIELDS.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return None
    return ToolCall.of(f"call_{uuid.uuid4().hex[:24]}", name, _SPACE.sub(r"\1", text))
