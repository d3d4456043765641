"""Regular expressions from an adapter's configuration, matched in linear time.

PEFT matches them with Python's ``re``, which backtracks: ``(a+)+b`` on a long name never ends, and holds the
interpreter lock. Here RE2 matches them (finite automata, https://swtch.com/~rsc/regexp/regexp1.html), after a
translation of the syntax that differs from Python's. Expressions that RE2 cannot match are refused:
look-around, back-references, conditions, atomic groups and possessive repeats. On the names of a model's
modules, which are ASCII of one line, both find the same.
"""

from __future__ import annotations

import re
from functools import cached_property
from typing import Protocol

import re2

MAX_LENGTH = 1000
"""Characters of one expression; those that training tools write have up to 600."""
_MAX_MEMORY = 1 << 16
"""RE2's memory for one expression, in bytes. It bounds the number of states, and so the time of a match."""

_PLAIN = re.compile(r"\^?(?:[\w.-]|\\[.-])*\$?", re.ASCII)
"""Expressions that are plain names. They are compared directly, because some tools write one for each
module."""
_CLASS_ESCAPES = frozenset("dDwWsStnrfva")
_ESCAPES = _CLASS_ESCAPES | frozenset("bBA")
_FLAGS = re.compile(r"\(\?([aimsu]+)\)")
_LOCAL_FLAGS = re.compile(r"\(\?([ims]*)(-[ims]+)?:")
_NAMED = re.compile(r"\(\?P<([A-Za-z_]\w*)>", re.ASCII)
_COMMENT = re.compile(r"\(\?#[^)]*\)")
_REPEAT = re.compile(r"\{(\d*)(,?)(\d*)\}", re.ASCII)
_BACK_REFERENCE = "a back-reference"
_UNSUPPORTED_GROUPS = {
    "(?=": "look-ahead",
    "(?!": "look-ahead",
    "(?<": "look-behind",
    "(?P=": _BACK_REFERENCE,
    "(?(": "a condition",
    "(?>": "an atomic group",
}


class PatternError(ValueError):
    """An expression that is not valid, or that cannot be matched in linear time."""


class _Compiled(Protocol):
    def match(self, string: str, /) -> object: ...
    def fullmatch(self, string: str, /) -> object: ...


class Pattern:
    """The expression ``before + text + after``, in the syntax of ``re``. Raises PatternError.

    Args:
        text: From the configuration.
        whole: Whether the whole name must match, and not just its beginning.
    """

    def __init__(self, text: str, *, before: str = "", after: str = "", whole: bool = False) -> None:
        if len(text) > MAX_LENGTH:
            raise PatternError(f"has {len(text)} characters, more than {MAX_LENGTH}")
        self._key = before + text + after, whole
        self.plain = _PLAIN.fullmatch(text) is not None
        """Whether it is a plain name."""
        compiled: _Compiled = re.compile(self._key[0]) if self.plain else _compile(self._key[0])
        self._find = compiled.fullmatch if whole else compiled.match

    def matches(self, name: str) -> bool:
        return self._find(name) is not None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pattern) and self._key == other._key

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(self._key)


def _compile(text: str) -> _Compiled:
    options = re2.Options()
    options.max_mem = _MAX_MEMORY
    options.never_capture = True
    options.log_errors = False
    try:
        compiled: _Compiled = re2.compile(_translated(text), options)
    except re2.error as error:
        reason = error.args[0] if error.args else ""
        words = reason.decode("utf-8", "replace") if isinstance(reason, bytes) else str(reason)
        raise PatternError(f"is not valid, or too complex: {words[:200]}") from None
    except UnicodeEncodeError:
        raise PatternError("is not valid: it has half of a surrogate pair") from None
    return compiled


def _translated(text: str) -> str:
    """Return the expression in RE2's syntax. Raises PatternError."""
    out: list[str] = []
    names: set[str] = set()
    at = 0
    flags = _FLAGS.match(text)
    if flags is not None:
        kept = "".join(flag for flag in flags[1] if flag in "ims")
        out.append(f"(?{kept})" if kept else "")
        at = flags.end()
    while at < len(text):
        char = text[at]
        if char == "\\":
            out.append(_escape(text[at + 1 : at + 2], _ESCAPES))
            at += 2
        elif char == "[":
            at = _class(text, at, out)
        elif char == "{" and (repeat := _REPEAT.match(text, at)) and repeat[0] != "{}":
            low, comma, high = repeat.groups()
            out.append(f"{{{low or 0},{high}}}" if comma else f"{{{low}}}")
            at = repeat.end()
        elif char == "{":
            out.append(r"\{")
            at += 1
        elif text.startswith("(?", at):
            at = _group(text, at, out, names)
        else:
            out.append(char)
            at += 1
    return "".join(out)


def _escape(char: str, known: frozenset[str]) -> str:
    if char in known:
        return f"\\{char}"
    if char == "Z" and "b" in known:
        return r"\z"
    if not char:
        raise PatternError("is not valid: it ends with a backslash")
    if char.isdigit():
        raise PatternError(f"uses {_BACK_REFERENCE}, which cannot be matched in linear time")
    if char.isalpha():
        raise PatternError(f"uses the escape \\{char}, which is not supported here")
    return re.escape(char) if char.isascii() else char


def _class(text: str, begin: int, out: list[str]) -> int:
    """Translate the character class that begins at a position; returns its end."""
    at = begin + 1
    out.append("[")
    if text.startswith("^", at):
        out.append("^")
        at += 1
    first = at
    while at < len(text):
        char = text[at]
        if char == "]" and at > first:
            out.append("]")
            return at + 1
        if char == "\\":
            escaped = text[at + 1 : at + 2]
            out.append(_escape(escaped, _CLASS_ESCAPES))
            at += 2
            if escaped in "dDwWsS" and text.startswith("-", at) and not text.startswith("-]", at):
                raise PatternError("is not valid: a range of characters that begins with a class")
        else:
            out.append(f"\\{char}" if char in "[]" else char)
            at += 1
    raise PatternError("is not valid: a character class has no end")


def _group(text: str, at: int, out: list[str], names: set[str]) -> int:
    """Translate the ``(?...`` group that begins at a position; returns its end."""
    if comment := _COMMENT.match(text, at):
        return comment.end()
    if named := _NAMED.match(text, at):
        if named[1] in names:
            raise PatternError(f"is not valid: two groups are called {named[1]}")
        names.add(named[1])
        out.append("(?:")
        return named.end()
    if local := _LOCAL_FLAGS.match(text, at):
        out.append(local[0])
        return local.end()
    for start, what in _UNSUPPORTED_GROUPS.items():
        if text.startswith(start, at):
            raise PatternError(f"uses {what}, which cannot be matched in linear time")
    if _FLAGS.match(text, at):
        raise PatternError("is not valid: flags for the whole expression must be at its start")
    raise PatternError(f"uses {text[at : at + 4]!r}, which is not supported here")
