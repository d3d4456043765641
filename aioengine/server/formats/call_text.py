"""The text that a format writes around the arguments of calls, so that a grammar can hold an answer to it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

MAX_CALLS = 16
"""Bound on the calls of one answer where calls are required and ``parallel_tool_calls`` is true."""
FIRST_ARGUMENTS = 3
"""Number of the grammar's line with the first tool's arguments; each tool has a line of its own."""


class CallText(NamedTuple):
    """The texts of calls whose arguments are JSON."""

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
        assert len(rules) + 1 == FIRST_ARGUMENTS
        rules += [f"arguments_{i}: %json {schema}" for i, schema in enumerate(schemas)]
        for i, name in enumerate(names):
            opening, closing = quoted(self.opening.format(name)), quoted(self.closing)
            rules.append(f"call_{i}: {opening}arguments_{i} {closing}".rstrip())
        return "\n".join(rules)
