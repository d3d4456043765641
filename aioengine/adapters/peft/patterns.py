"""Regular expressions from an adapter's configuration, matched in linear time.

PEFT matches them with Python's ``re``, which backtracks: ``(a+)+b`` on a long name never ends, and holds the
interpreter lock. Here RE2 matches them (finite automata, https://swtch.com/~rsc/regexp/regexp1.html). What it
does not take is refused: look-around, back-references, comments and others. On the names of a model's
modules, which are ASCII of one line, both find the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import re2

MAX_LENGTH = 1000
"""Characters of one expression; those that training tools write have up to 600."""
_MAX_MEMORY = 1 << 16
"""RE2's memory for one expression, in bytes. It bounds the number of states, and so the time of a match."""

_PLAIN = re.compile(r"\^?(?:[\w.-]|\\[.-])*\$?", re.ASCII)
"""Expressions that are plain names. They are compared directly, because some tools write one for each
module."""
_ANOTHER_MEANING = ("{,", "[:")
"""What both take, and understand differently: ``a{,2}``, and ``[[:alpha:]]``."""


class PatternError(ValueError):
    """An expression that is not valid, or that RE2 does not take."""


class Pattern:
    """The expression ``before + text + after``. Raises PatternError.

    Args:
        text: From the configuration.
        whole: Whether the whole name must match, and not just its beginning.
    """

    def __init__(self, text: str, *, before: str = "", after: str = "", whole: bool = False) -> None:
        if len(text) > MAX_LENGTH:
            raise PatternError(f"it has {len(text)} characters, more than {MAX_LENGTH}")
        self.plain = _PLAIN.fullmatch(text) is not None
        """Whether it is a plain name."""
        compiled = (re.compile if self.plain else _compile)(before + text + after)
        self._find: Callable[[str], object] = compiled.fullmatch if whole else compiled.match

    def matches(self, name: str) -> bool:
        return self._find(name) is not None


def _compile(text: str) -> Any:
    """Compile with RE2. Raises PatternError."""
    for syntax in _ANOTHER_MEANING:
        if syntax in text:
            raise PatternError(f"{syntax!r} means something else to RE2 than to Python")
    options = re2.Options()
    options.max_mem = _MAX_MEMORY
    options.never_capture = True
    options.log_errors = False
    try:
        return re2.compile(text, options)
    except re2.error as error:
        reason = error.args[0] if error.args else ""
        words = reason.decode("utf-8", "replace") if isinstance(reason, bytes) else str(reason)
        raise PatternError(words[:200]) from None
    except UnicodeEncodeError:
        raise PatternError("it has half of a surrogate pair") from None
